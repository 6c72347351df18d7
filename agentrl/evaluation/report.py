"""The report of a run: one self-contained HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import Episode, Outcome
from agentrl.errors import AgentRLError
from agentrl.evaluation.pages import render_page
from agentrl.evaluation.results_table import (
    data_line,
    final_policies,
    format_number,
    panel_line,
    rate_and_interval,
    results_by_environment,
    step_of,
    task_types,
)
from agentrl.evaluation.statistics import intervals_separate
from agentrl.files import write_atomic
from agentrl.run.logger import read_metrics
from agentrl.run.records import read_manifest, read_summary

Tree = Mapping[str, Any]

_COMPARED = ("random", "cloned", "trained")  # in the overview of several environments
_MAX_TEXT_CHARS = 4000  # of one observation or reply


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` from the files in the run's folder, without the sections whose files are missing.

    Returns:
        The path of the report.

    Raises:
        CheckpointError: If a file in the folder is damaged.
        OSError: If the disk is full; an older report is left as it was.
    """
    folder = Path(run_folder)
    path = folder / "report.html"
    write_atomic(path, render_page("report", _content(folder)))
    return path


def _content(folder: Path) -> dict[str, Any]:
    from agentrl.evaluation import figures  # loads matplotlib (half a second), which a table does not need
    from agentrl.evaluation.diagnostics.sections import diagnostic_sections

    summary, manifest = read_summary(folder), read_manifest(folder) or {}
    training = read_metrics(folder / "metrics.jsonl", "train")
    results = results_by_environment(summary)
    entropy_figures = [figures.draw_entropy_over_steps(training)] if training else []
    for own in results.values():
        by_turn = {
            name: values
            for name, decodings in final_policies(own).items()
            if (values := decodings.get("sampled", {}).get("entropy", {}).get("by_turn"))
        }
        entropy_figures += [figures.draw_entropy_by_turn(by_turn)] if by_turn else []
    labels = [data_line(own) for own in results.values()]
    source, episodes = _select_episodes(folder / "episodes")
    config = folder / "config.yaml"
    return {
        "name": folder.resolve().name,
        "subtitle": " · ".join(str(part) for part in (summary.get("env"), *labels) if part),
        "results": [_results(name, own, training) for name, own in results.items()],
        "overview": list(_overview_rows(results)) if len(results) > 1 else [],
        "entropy_figures": entropy_figures,
        "signals_figure": figures.draw_signals(training, results) if training else None,
        "diagnostics": list(diagnostic_sections(folder)),
        "waiting": _waiting_line(summary.get("times", {})),
        "episodes_source": source,
        "episodes": _episode_rows(episodes),
        "compared": _COMPARED,
        "facts": list(_fact_rows(summary, manifest)),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    }


def _results(name: str, summary: Tree, training: Sequence[Tree]) -> dict[str, Any]:
    """Return the results in an environment; those of a single one have no name."""
    from agentrl.evaluation import figures

    policies, points = final_policies(summary), _curve_points(summary, training)
    return {
        "name": name,
        "tiles": _tiles(policies),
        "success_figure": figures.draw_success(policies) if policies else "",
        "verdicts": _verdicts(policies),
        "columns": ["success", *task_types(policies)],
        "rows": list(_score_rows(policies)),
        "panel": panel_line(summary),
        "instruction": list(_instruction_rows(summary)),
        "curve_figure": figures.draw_learning_curve(training, points, name) if training else "",
    }


def _overview_rows(results: Mapping[str, Tree]) -> Iterable[dict[str, Any]]:
    """Yield a row for each of several environments: what policies reached, sampled."""
    for name, summary in results.items():
        policies = final_policies(summary)
        scores = [policies.get(policy, {}).get("sampled") for policy in _COMPARED]
        cells = [dict(zip(("rate", "interval"), rate_and_interval(score), strict=True)) for score in scores]
        yield {"name": name, "cells": cells, "panel": panel_line(summary)}


def _score_rows(policies: Mapping[str, Mapping[str, Tree]]) -> Iterable[dict[str, Any]]:
    types = task_types(policies)
    for name, decodings in policies.items():
        for index, (decoding, score) in enumerate(decodings.items()):
            cells = [
                rate_and_interval(score),
                *(rate_and_interval(score["by_task_type"].get(kind)) for kind in types),
            ]
            yield {
                "policy": name,
                "decoding": decoding,
                "first": index == 0,
                "cells": [{"rate": rate, "interval": interval} for rate, interval in cells],
                "turns": format_number(score.get("mean_turns"), 1),
                "returned": format_number(score.get("mean_return"), 2),
                "aborted": _format_aborted(score),
            }


def _format_aborted(score: Tree) -> str:
    aborted = score.get("aborted", 0)
    if not aborted:
        return "0"
    reasons = ", ".join(f"{count} x {reason}" for reason, count in score.get("aborted_reasons", {}).items())
    return f"{aborted} of {aborted + score['episodes']} ({reasons})"


def _tiles(policies: Mapping[str, Mapping[str, Tree]]) -> list[dict[str, str]]:
    """Return the headline numbers: the cloned and the trained policy, sampled and greedy."""
    tiles = []
    for decoding in ("sampled", "greedy"):
        for name in ("cloned", "trained"):
            score = policies.get(name, {}).get(decoding)
            if score is not None:
                rate, interval = rate_and_interval(score)
                tiles.append(
                    {"label": f"{name}, {decoding}", "value": f"{rate} %", "note": f"{interval} success"}
                )
    return tiles


def _verdicts(policies: Mapping[str, Mapping[str, Tree]]) -> list[str]:
    before, after = policies.get("cloned", {}), policies.get("trained", {})
    sentences = []
    for decoding in after:
        if decoding not in before or None in (
            before[decoding]["success_rate"],
            after[decoding]["success_rate"],
        ):
            continue
        apart = intervals_separate(before[decoding]["interval"], after[decoding]["interval"])
        side = "above" if after[decoding]["success_rate"] > before[decoding]["success_rate"] else "below"
        verdict = (
            f"the interval of the trained policy lies entirely {side} that of the cloned policy"
            if apart
            else "the intervals overlap, so this panel does not separate the trained from the cloned policy"
        )
        sentences.append(f"{decoding.capitalize()}: {verdict}.")
    return sentences


def _instruction_rows(summary: Tree) -> Iterable[dict[str, Any]]:
    for decoding, check in (summary.get("instruction_check") or {}).items():
        for key, goal in (
            ("new_goal", "the new goal, which it was given"),
            ("old_goal", "the panel's goal, which it was not given"),
        ):
            rate, interval = rate_and_interval(check[key])
            reached = {"rate": f"{rate} %", "interval": interval, "episodes": check[key]["episodes"]}
            yield reached | {"decoding": decoding, "goal": goal}


def _curve_points(summary: Tree, training: Sequence[Tree]) -> dict[str, list[tuple[int, float, Any]]]:
    """Return the points of the learning curve of each decoding: before, during and after training."""
    last = training[-1]["step"] if training else 0
    points: dict[str, list[tuple[int, float, Any]]] = {}
    for name, decodings in summary.get("policies", {}).items():
        step = {"cloned": 0, "trained": last}.get(name, step_of(name))
        for decoding, score in decodings.items():
            if step is not None and score["success_rate"] is not None:
                points.setdefault(decoding, []).append(
                    (step, score["success_rate"], tuple(score["interval"]))
                )
    return {decoding: sorted(found) for decoding, found in points.items()}


def _select_episodes(folder: Path) -> tuple[str, list[Episode]]:
    """Select two successes and two failures of the newest file that has both, else of the newest file."""
    files = sorted(
        folder.glob("*.parquet"), key=lambda path: (path.name.startswith("trained"), path.name), reverse=True
    )
    chosen: tuple[str, list[Episode]] = "", []
    for path in files:
        try:
            episodes = read_episodes(path)
        except AgentRLError:
            continue  # a damaged file must not prevent the report of the rest
        kinds = [
            [e for e in episodes if e.outcome is outcome][:2]
            for outcome in (Outcome.SUCCESS, Outcome.FAILURE)
        ]
        if not chosen[1] or all(kinds):
            chosen = f"From {path.name}.", [episode for kind in kinds for episode in kind]
        if all(kinds):
            break
    return chosen


def _episode_rows(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    known = [turn.entropy for episode in episodes for turn in episode.turns if turn.entropy is not None]
    most = max(known, default=0.0) or 1.0
    return [
        {
            "task": episode.task,
            "type": episode.task_type or "",
            "outcome": episode.outcome.value,
            "stop": episode.stop.value,
            "entropy": "" if episode.entropy is None else f"{episode.entropy:.3f}",
            "last": _truncate(episode.final_observation),
            "turns": [
                {
                    "observation": _truncate(turn.observation),
                    "action": _truncate(turn.action),
                    "entropy": format_number(turn.entropy, 3),
                    "reward": f"{turn.reward:g}",
                    "shade": f"{0.45 * (turn.entropy or 0.0) / most:.3f}",
                }
                for turn in episode.turns
            ],
        }
        for episode in episodes
    ]


def _truncate(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]} … ({len(text)} characters)"


def _fact_rows(summary: Tree, manifest: Tree) -> Iterable[tuple[str, str]]:
    """Yield everything else that the two files hold, one row each."""
    for tree in (summary, manifest):
        for key, value in tree.items():
            if key not in ("policies", "instruction_check", "environments"):
                yield "seconds" if key == "times" else key.replace("_", " "), _format_value(value)


def _waiting_line(times: Mapping[str, float]) -> str:
    """Return how long rollout and learning waited for each other in an async run."""
    if "learning.waited.wall" not in times:
        return ""
    return (
        f"In async mode, the learner waited {times['learning.waited.wall']:,.0f} s for episodes, "
        f"and rollout waited {times['rollout.waited.wall']:,.0f} s for newer weights."
    )


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_format_value(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
