"""Scores of a policy, computed from the episodes that it played on a panel."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from agentrl.data.entropies import entropies_by_level, entropies_by_turn
from agentrl.data.trajectory import Episode
from agentrl.env.panel import Panel
from agentrl.evaluation.statistics import (
    Rate,
    TaskMean,
    pass_at_k,
    pass_hat_k,
    pass_rate,
    powers_of_two,
    success_rate,
)
from agentrl.rollout.failures import abort_reasons


@dataclass(frozen=True)
class Entropy:
    """Mean entropies of a policy's sampled tokens in nats; None for a policy that records none.

    Args:
        token: The mean over all sampled tokens.
        turn: The mean over turns of each turn's mean.
        trajectory: The mean over episodes of each episode's mean over turns.
        by_turn: For each turn index, the mean over the episodes that reached that turn.
    """

    token: float | None = None
    turn: float | None = None
    trajectory: float | None = None
    by_turn: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Score of a policy on a panel.

    Aborted episodes are left out of every rate and mean; they and their reasons are counted.

    Args:
        success: The success rate over all task types.
        by_task_type: The success rate of each task type.
        aborted: The number of aborted episodes, which say nothing about the policy.
        aborted_reasons: The number of aborted episodes for each reason.
        mean_return: The mean return in the environment's reward units; None without a finished episode.
        mean_turns: The mean number of turns per episode.
        stop_reasons: The number of episodes for each stop reason, aborted ones included.
        entropy: The entropies of the policy's sampled tokens.
        panel_hash: The hash of the panel's tasks and their content.
        data: The environment's label of the data behind its tasks, e.g. `generated`.
        repeats: The number of episodes per task.
        pass_at: For k = 1, 2, 4, … up to `repeats`, pass@k: the estimated share of tasks that at least one of
            k episodes solves. Empty for single plays.
        pass_hat: For the same k, pass^k: the share that all of k episodes solve.
        retried: The number of attempts that were aborted and played again.
        checkpoint: The name of the checkpoint that was played; None for any other policy.
        steps_per_second: Environment steps per second over all episodes, the policy's time included; None if
            it was not measured.
        fingerprint: What the scores were measured with, see `agentrl.evaluation.fingerprint`; None for the
            scores of a run, which its manifest describes.
        usage: The numbers of requests, retries and tokens of a policy on a chat server, its first request
            included; None for any other.
    """

    success: Rate
    by_task_type: Mapping[str, Rate]
    aborted: int
    aborted_reasons: Mapping[str, int]
    mean_return: float | None
    mean_turns: float | None
    stop_reasons: Mapping[str, int]
    entropy: Entropy
    panel_hash: str
    data: str | None = None
    repeats: int = 1
    pass_at: Mapping[int, TaskMean] = field(default_factory=dict)
    pass_hat: Mapping[int, TaskMean] = field(default_factory=dict)
    retried: int = 0
    checkpoint: str | None = None
    steps_per_second: float | None = field(default=None, compare=False)
    fingerprint: Mapping[str, Any] | None = field(default=None, compare=False)
    usage: Mapping[str, int] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as summary.json holds them for one policy and decoding."""
        tree = asdict(self)
        overall: dict[str, Any] = tree.pop("success")
        for name in ("pass_at", "pass_hat"):
            values = tree.pop(name)
            tree |= {name: {str(k): value for k, value in values.items()}} if values else {}
        for name in ("checkpoint", "fingerprint", "usage"):
            if tree[name] is None:
                del tree[name]
        return overall | tree


@dataclass(frozen=True)
class InstructionCheck:
    """Score of a policy that is given another goal for the same initial state: whether it reads instructions.

    Args:
        new_goal: The rate at which the given goal was reached.
        old_goal: The rate at which the goal of the panel's task was reached, which the policy was not given.
        aborted: The number of aborted episodes, which count in neither rate.
        stop_reasons: The number of episodes for each stop reason, aborted ones included.
    """

    new_goal: Rate
    old_goal: Rate
    aborted: int = 0
    stop_reasons: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as summary.json holds them for one decoding."""
        return asdict(self)


def summarise(
    episodes: Sequence[Episode], panel: Panel, repeats: int = 1, *, data: str | None = None
) -> Evaluation:
    """Compute the scores of the episodes that were played on a panel.

    Args:
        episodes: The episodes, in any order.
        panel: The panel that they were played on.
        repeats: The number of episodes per task.
        data: The environment's label of the data behind its tasks.

    Raises:
        ValueError: If a task of the panel was not played exactly `repeats` times, or another task was played.
    """
    plays = Counter(episode.task for episode in episodes)
    if plays != dict.fromkeys(panel.tasks, repeats):
        wrong = {task: plays[task] for task in {*plays, *panel.tasks} if plays[task] != repeats}
        raise ValueError(
            f"each of the panel's {len(panel.tasks)} tasks is played {repeats} times, not {wrong}"
        )
    finished = [episode for episode in episodes if not episode.stop.aborted]
    aborted = [episode for episode in episodes if episode.stop.aborted]
    types = sorted({episode.task_type for episode in finished if episode.task_type is not None})
    plays_of_task = _plays_of_task(finished)
    most = powers_of_two(repeats) if repeats > 1 else ()
    return Evaluation(
        success=_rate(finished),
        by_task_type={name: _rate(e for e in finished if e.task_type == name) for name in types},
        aborted=len(aborted),
        aborted_reasons=dict(abort_reasons(aborted)),
        mean_return=_mean(episode.episode_return for episode in finished),
        mean_turns=_mean(len(episode.turns) for episode in finished),
        stop_reasons=_stop_reasons(episodes),
        entropy=mean_entropy(finished),
        panel_hash=panel.hash,
        data=data,
        repeats=repeats,
        pass_at={k: pass_rate(plays_of_task, k, pass_at_k) for k in most},
        pass_hat={k: pass_rate(plays_of_task, k, pass_hat_k) for k in most},
    )


def summarise_instruction_check(episodes: Sequence[Episode]) -> InstructionCheck:
    """Compute the scores of episodes that were given another goal than that of the panel's task."""
    finished = [episode for episode in episodes if not episode.stop.aborted]
    return InstructionCheck(
        new_goal=_rate(finished),
        old_goal=success_rate([[_other_success(episode)] for episode in finished]),
        aborted=len(episodes) - len(finished),
        stop_reasons=_stop_reasons(episodes),
    )


def mean_entropy(episodes: Iterable[Episode]) -> Entropy:
    """Compute the mean entropies of episodes at each level, over sampled tokens only."""
    episodes = list(episodes)
    levels = entropies_by_level(episodes)
    return Entropy(
        token=_mean(levels["token"]),
        turn=_mean(levels["turn"]),
        trajectory=_mean(levels["trajectory"]),
        by_turn=tuple(map(fmean, entropies_by_turn(episodes).values())),
    )


def _rate(finished: Iterable[Episode]) -> Rate:
    return success_rate(_plays_of_task(finished))


def _plays_of_task(finished: Iterable[Episode]) -> list[list[bool]]:
    """Return the outcomes of the episodes of each task."""
    plays: dict[str, list[bool]] = defaultdict(list)
    for episode in finished:
        plays[episode.task].append(episode.success)
    return list(plays.values())


def _stop_reasons(episodes: Iterable[Episode]) -> dict[str, int]:
    return dict(Counter(episode.stop.value for episode in episodes).most_common())


def _other_success(episode: Episode) -> bool:
    return any(turn.info.get("other_success") is True for turn in episode.turns)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return fmean(listed) if listed else None
