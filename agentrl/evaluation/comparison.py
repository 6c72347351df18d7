"""Compare policies on the tasks that all of them have played, from what runs and evaluations have stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import agentrl
from agentrl.data.trajectory import Episode
from agentrl.env.names import unknown
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.comparison_tables import comparison_notes, comparison_tables, figure_rows
from agentrl.evaluation.diagnostics.findings import Findings
from agentrl.evaluation.evaluate import policy_name
from agentrl.evaluation.fingerprint import COMPARED, MODEL, Fingerprint, check_alike, unlike
from agentrl.evaluation.pages import render_page
from agentrl.evaluation.paired import Outcomes, PairedDifference, paired_difference, task_means
from agentrl.evaluation.statistics import Rate, TaskMean, pass_at_k, pass_rate, powers_of_two, success_rate
from agentrl.evaluation.stored_scores import TEMPERATURES, StoredScore, find_scores
from agentrl.run.folder import Run

# Without these the same, plays are not paired.
_ALWAYS = ("panel.hash", "panel.repeats", "data")
VARYING = tuple(key for key in (*COMPARED, *MODEL) if key not in _ALWAYS)

_Plays = Mapping[str, Sequence[Episode]]  # by task
_Panels = Sequence[Mapping[str, StoredScore]]  # by policy, the baseline first


@dataclass(frozen=True)
class Comparison:
    """Comparison of policies with the first of them, the baseline.

    Args:
        numbers: JSON values: `baseline`, `decoding`, `varying`, `policies`, `not_compared`, and by label the
            `panels`, each with its `rows`. A row has the `scores` of each policy, and the `differences` of
            each but the baseline, see `PairedDifference`.
    """

    numbers: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return dict(self.numbers)

    @property
    def tables(self) -> list[Findings]:
        """Return a table for each policy but the baseline."""
        return comparison_tables(self.numbers)

    @property
    def notes(self) -> list[str]:
        """Return lines that say what was compared, and how."""
        return comparison_notes(self.numbers)

    def to_markdown(self) -> str:
        """Return the tables and the notes as Markdown."""
        *first, last = self.tables
        with_notes = Findings(last.title, last.columns, last.rows, tuple(self.notes))
        return "\n".join(table.to_markdown() for table in (*first, with_notes))

    def to_html(self) -> str:
        """Return one self-contained page with the tables and the figure of the differences."""
        from agentrl.evaluation.figures import draw_differences  # loads matplotlib

        numbers = self.numbers
        content = {
            "baseline": numbers["baseline"],
            "subtitle": f"agentrl {numbers['agentrl']} · {numbers['decoding']}",
            "figure": draw_differences(figure_rows(numbers), numbers["baseline"]),
            "tables": self.tables,
            "notes": self.notes,
        }
        return render_page("comparison", content)


def compare(
    *folders: Run | str | Path, decoding: str | None = None, varying: Sequence[str] = ()
) -> Comparison:
    """Compare policies with a baseline, on the tasks of the panels that all of them have played.

    Nothing is played: the scores are those that runs and evaluations have stored.

    Args:
        folders: Runs, of which the trained policy is compared, and folders that `agentrl evaluate --output`
            wrote, of which every policy is. The first policy is the baseline.
        decoding: `sampled` or `greedy`; None takes that of the evaluations, or `sampled` for runs alone.
        varying: What is to differ, of `VARYING`, such as `prompt.text`.

    Raises:
        ConfigError: If there are fewer than two policies, or they were not measured alike, see `check_alike`.
        CheckpointError: If there is no such folder, it is damaged, or its run or evaluation is not finished.
    """
    for key in varying:
        if key not in VARYING:
            raise ConfigError(f"varying is {key!r}, wanted one of {', '.join(VARYING)}")
    names = [policy_name(folder) for folder in folders]
    if not names:
        raise ConfigError("there are no folders, wanted at least two policies to compare")
    if len(set(names)) < len(names):
        raise ConfigError(f"the folders are {', '.join(names)}; wanted each once")
    found = find_scores(names)
    if decoding is None:
        decoding = next((each.decoding for each in found if each.decoding is not None), "sampled")
    if decoding not in TEMPERATURES:
        raise unknown("decoding", decoding, TEMPERATURES)
    scores = {name: panels for each in found for name, panels in each.read(decoding).items()}
    if len(scores) < 2:
        raise ConfigError(f"{names[0]} holds one policy, wanted at least two: the baseline and another")
    played, missing = _split(_matched(scores))
    for panel in played:
        _check_alike({name: score.fingerprint for name, score in panel.items()}, varying)
    if not played:
        raise ConfigError(f"no panel was played by all: {'; '.join(missing)}")
    baseline = next(iter(scores))
    return Comparison(
        {
            "agentrl": agentrl.__version__,
            "baseline": baseline,
            "decoding": decoding,
            "varying": _differing(played, varying),
            "policies": {name: score.fingerprint["policy"] for name, score in played[0].items()},
            "not_compared": missing,
            "panels": {panel[baseline].label: _compare_panel(panel, baseline) for panel in played},
        }
    )


def _matched(scores: Mapping[str, Sequence[StoredScore]]) -> _Panels:
    """Return the scores of each panel: of the same hash, else of the same name, else of its environment.

    Raises:
        ConfigError: If a policy has no scores on a panel of another.
    """
    (first, own), *others = scores.items()
    panels = [{first: score} for score in own]
    for name, found in others:
        left = list(found)
        for same in (_same_hash, _same_label, _same_env):
            for panel in panels:
                match = next((score for score in left if same(score, panel[first])), None)
                if name not in panel and match is not None:
                    panel[name] = match
                    left.remove(match)
        lines = [f"{name} has none on {panel[first].label}" for panel in panels if name not in panel]
        lines += [f"{first} has none on {score.label}" for score in left]
        if lines:
            raise ConfigError("these scores cannot be compared: " + "; ".join(lines))
    return panels


def _same_hash(one: StoredScore, other: StoredScore) -> bool:
    return one.hash is not None and one.hash == other.hash


def _same_label(one: StoredScore, other: StoredScore) -> bool:
    return one.label == other.label


def _same_env(one: StoredScore, other: StoredScore) -> bool:
    return one.env == other.env


def _check_alike(fingerprints: Mapping[str, Fingerprint], varying: Sequence[str]) -> None:
    """Refuse scores that were not measured alike, and say which keys would allow it.

    Raises:
        ConfigError: Naming what differs.
    """
    try:
        check_alike(fingerprints, varying=varying, models=True)
    except ConfigError as error:
        own, *others = fingerprints.values()
        found = {key for other in others for key, *_ in unlike(own, other, varying=varying, models=True)}
        keys = " ".join(f"--varying {key}" for key in VARYING if key in found)
        if not keys or found & set(_ALWAYS):
            raise
        raise ConfigError(f"{error}\nif they are meant to: {keys}") from error


def _split(panels: _Panels) -> tuple[_Panels, list[str]]:
    """Return the panels that all have played, and a line for each score that is missing."""
    played = [panel for panel in panels if all(score.error is None for score in panel.values())]
    return played, [
        f"{score.label}, not played by {name}: {score.error}"
        for panel in panels
        for name, score in panel.items()
        if score.error is not None
    ]


def _differing(panels: _Panels, varying: Sequence[str]) -> list[str]:
    """Return a line for each setting that was to differ and does."""
    lines = []
    for panel in panels:
        (_, own), *others = panel.items()
        for name, score in others:
            found = unlike(own.fingerprint, score.fingerprint, models=True)
            lines += [f"{key}: {now} for {name}, {before} for the baseline" for key, before, now in found]
    return list(dict.fromkeys(lines))


def _compare_panel(panel: Mapping[str, StoredScore], baseline: str) -> dict[str, Any]:
    """Return the comparison on a panel as JSON values."""
    plays: dict[str, _Plays] = {name: score.read() for name, score in panel.items()}
    for name, own in plays.items():
        if own.keys() != plays[baseline].keys():
            raise CheckpointError(f"{panel[name].file}: holds other tasks than {panel[baseline].file}")
    fingerprint = panel[baseline].fingerprint
    aborted = {
        name: sum(episode.stop.aborted for each in own.values() for episode in each)
        for name, own in plays.items()
    }
    described = {key: fingerprint["panel"][key] for key in ("env", "split", "tasks", "repeats", "hash")}
    return {
        **described,
        "data": fingerprint.get("data"),
        "aborted": aborted,
        "rows": list(_rows(plays, baseline, fingerprint["panel"]["repeats"])),
    }


def _rows(plays: Mapping[str, _Plays], baseline: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the success rate, pass@k and the success rate of each task type."""
    yield _success("success", plays, baseline)
    for k in powers_of_two(repeats)[1:]:
        values = {
            name: {task: _pass_at(each, k) for task, each in own.items()} for name, own in plays.items()
        }
        scores = {
            name: pass_rate([_finished(each) for each in own.values()], k, pass_at_k)
            for name, own in plays.items()
        }
        yield _row(f"pass@{k}", scores, values, baseline)
    kinds = {_task_type(each) for own in plays.values() for each in own.values()} - {None}
    for kind in sorted(map(str, kinds)):
        tasks = {task for own in plays.values() for task, each in own.items() if _task_type(each) == kind}
        of_kind = {name: {task: own[task] for task in tasks} for name, own in plays.items()}
        yield _success(kind, of_kind, baseline) | {"task_type": kind}


def _success(label: str, plays: Mapping[str, _Plays], baseline: str) -> dict[str, Any]:
    scores = {name: success_rate([_finished(each) for each in own.values()]) for name, own in plays.items()}
    values = {
        name: task_means(episode for each in own.values() for episode in each) for name, own in plays.items()
    }
    return _row(label, scores, values, baseline)


def _row(
    label: str, scores: Mapping[str, Rate | TaskMean], values: Mapping[str, Outcomes], baseline: str
) -> dict[str, Any]:
    return {
        "label": label,
        "scores": {name: _json(score) for name, score in scores.items()},
        "differences": {
            name: _json(paired_difference(own, values[baseline]))
            for name, own in values.items()
            if name != baseline
        },
    }


def _json(estimate: Rate | TaskMean | PairedDifference) -> dict[str, Any]:
    return asdict(estimate) | {"interval": list(estimate.interval)}


def _finished(episodes: Sequence[Episode]) -> list[bool]:
    return [episode.success for episode in episodes if not episode.stop.aborted]


def _pass_at(episodes: Sequence[Episode], k: int) -> float:
    """Return pass@k of a task; NaN if too few plays were finished."""
    finished = _finished(episodes)
    return pass_at_k(len(finished), sum(finished), k) if len(finished) >= k else float("nan")


def _task_type(episodes: Sequence[Episode]) -> str | None:
    """Return the task type; an episode that was aborted before its first observation knows none."""
    return next((episode.task_type for episode in episodes if episode.task_type is not None), None)
