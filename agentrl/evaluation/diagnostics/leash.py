"""Compare what a trained policy solves within k plays with what its base does (Invisible Leash)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from agentrl.data.trajectory import Episode
from agentrl.errors import ConfigError
from agentrl.evaluation.diagnostics.findings import write_findings
from agentrl.evaluation.diagnostics.support import (
    DELTA,
    answer_entropy,
    compare_support,
    visible_probability,
)
from agentrl.evaluation.diagnostics.tables import leash_findings
from agentrl.evaluation.evaluate import policy_name
from agentrl.evaluation.fingerprint import check_alike
from agentrl.evaluation.scores import Evaluation, mean_entropy
from agentrl.evaluation.statistics import pass_at_k, pass_rate, powers_of_two
from agentrl.evaluation.suite import Results, evaluate_panels
from agentrl.run.folder import Run

NAME = "leash"


@dataclass(frozen=True)
class Play:
    """One finished play of a task."""

    success: bool
    answer: str  # hash of all actions, since those of long episodes are many


def check_leash(k: int | None, repeats: int, temperature: float) -> int:
    """Return the number of plays to compare, and refuse what cannot be compared.

    Raises:
        ConfigError: Naming the option and what was wanted.
    """
    if temperature == 0:
        raise ConfigError("--against compares samples of each task, wanted --sampled in place of --greedy")
    if repeats < 2:
        raise ConfigError(f"--repeats is {repeats}, wanted at least 2 with --against, such as 256")
    if k is not None and k > repeats:
        raise ConfigError(f"--k is {k}, wanted at most --repeats, which is {repeats}")
    return repeats if k is None else k


def measure_leash(
    policy: Run | str | Path,
    against: Run | str | Path,
    *,
    k: int | None = None,
    repeats: int = 256,
    temperature: float = 1.0,
    output: str | Path | None = None,
    **options: Any,
) -> tuple[Results, dict[str, Any]]:
    """Play the same panels with a policy and its base, and compare what each solves within k plays.

    Args:
        policy: The trained policy, as `evaluate` takes it.
        against: Its base, such as an early checkpoint or the model that the run began with.
        k: The largest k of pass@k, and the number of plays of a task in which a solution is seen or not; None
            takes `repeats`. The first k plays that were not aborted count.
        repeats: The number of episodes per task.
        temperature: The sampling temperature.
        output: As in `evaluate_panels`; `leash.json`, `leash.md` and `leash.svg` are written there as well.
        options: Further arguments of `evaluate_panels`.

    Returns:
        The scores, and the comparison of each panel as JSON values.

    Raises:
        ConfigError: If k is larger than `repeats`, or the two were not to be measured alike.
    """
    most = check_leash(k, repeats, temperature)
    base, trained = policy_name(against), policy_name(policy)
    plays: dict[tuple[str, str], dict[str, list[Play]]] = {}
    tokens: dict[tuple[str, str], float | None] = {}

    def reduce(name: str, label: str, episodes: Sequence[Episode]) -> None:
        found: dict[str, list[Play]] = defaultdict(list)
        finished = [episode for episode in episodes if not episode.stop.aborted]
        for episode in finished:
            found[episode.task].append(Play(episode.success, _answer(episode)))
        plays[name, label], tokens[name, label] = found, mean_entropy(finished).token

    results = evaluate_panels(
        [base, trained],
        repeats=repeats,
        temperature=temperature,
        output=output,
        on_panel=reduce,
        **options,
    )
    labels = [score.label for score in results.scores[base] if (base, score.label) in plays]
    labels = [label for label in labels if (trained, label) in plays]
    for label in labels:
        check_alike({name: _fingerprint(results, name, label) for name in (base, trained)})
    panels = {
        label: compare_plays(
            {name: plays[name, label] for name in (base, trained)},
            {name: tokens[name, label] for name in (base, trained)},
            most,
        )
        for label in labels
    }
    numbers = {
        "base": base,
        "trained": trained,
        "k": most,
        "delta": DELTA,
        "eps": visible_probability(most),
        "repeats": repeats,
        "seed": results.seed,
        "panels": panels,
    }
    if output is not None and panels:
        from agentrl.evaluation.diagnostics.drawing import draw_leash

        write_findings(Path(output), NAME, numbers, leash_findings(numbers), draw_leash)
    return results, numbers


def compare_plays(
    plays: Mapping[str, Mapping[str, Sequence[Play]]], tokens: Mapping[str, float | None], k: int
) -> dict[str, Any]:
    """Return the comparison on a panel as JSON values.

    Args:
        plays: By policy, the base first, the finished plays of each task.
        tokens: The token entropy of each policy in nats.
        k: The number of plays of each task that are compared; tasks with fewer are left out.
    """
    base, trained = plays.values()
    tasks = [task for task in base if min(len(base[task]), len(trained.get(task, ()))) >= k]
    ks = sorted({*powers_of_two(k), k})
    of_task: list[set[Any]] = []
    solutions: list[set[Any]] = []
    policies = {}
    for name, own in plays.items():
        first = {task: own[task][:k] for task in tasks}
        of_task.append({task for task in tasks if any(play.success for play in first[task])})
        solutions.append({(task, play.answer) for task in tasks for play in first[task] if play.success})
        outcomes = [[play.success for play in own[task]] for task in tasks]
        entropies = [answer_entropy([play.answer for play in first[task]]) for task in tasks]
        policies[name] = {
            "pass_at": {str(each): asdict(pass_rate(outcomes, each, pass_at_k)) for each in ks},
            "token_entropy": tokens[name],
            "answer_entropy": fmean(entropies) if entropies else None,
        }
    return {
        "tasks": len(tasks),
        "left_out": len({*base, *trained}) - len(tasks),
        "policies": policies,
        "support": {
            "tasks": compare_support(*of_task).to_dict(),
            "solutions": compare_support(*solutions).to_dict(),
        },
    }


def _answer(episode: Episode) -> str:
    """Return a hash of an episode's actions, which are its answer as a whole."""
    actions = "\0".join(turn.action for turn in episode.turns)
    return sha256(actions.encode("utf-8", "surrogatepass")).hexdigest()


def _fingerprint(results: Results, name: str, label: str) -> Mapping[str, Any]:
    found: Evaluation | None = next(
        score.evaluation for score in results.scores[name] if score.label == label
    )
    return {} if found is None or found.fingerprint is None else found.fingerprint
