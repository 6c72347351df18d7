"""The tables, notes and figure rows of a comparison, made of its numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from agentrl.evaluation.diagnostics.findings import Findings, Numbers
from agentrl.evaluation.paired import RESAMPLES

Rows = list[tuple[str, Mapping[str, Numbers]]]


def comparison_tables(numbers: Numbers) -> list[Findings]:
    """Return a table for each policy but the baseline; the first column of numbers is the baseline's."""
    baseline = numbers["baseline"]
    columns = ("success %", "baseline", "compared", "difference", "gained/lost", "p")
    return [
        Findings(
            f"{name} against {baseline}",
            columns,
            tuple(
                (
                    label,
                    _score(row["scores"][baseline]),
                    _score(row["scores"][name]),
                    _difference(row["differences"][name]),
                    f"{row['differences'][name]['gained']}/{row['differences'][name]['lost']}",
                    _p_value(row["differences"][name]["p_value"]),
                )
                for label, row in _labelled_rows(numbers)
            ),
            (),
        )
        for name in numbers["policies"]
        if name != baseline
    ]


def figure_rows(numbers: Numbers) -> Rows:
    """Return the rows of the figure of differences."""
    return [(label, row["differences"]) for label, row in _labelled_rows(numbers)]


def comparison_notes(numbers: Numbers) -> list[str]:
    """Return lines that say what was compared, and how."""
    panels: Mapping[str, Any] = numbers["panels"]
    repeated = any(panel["repeats"] > 1 for panel in panels.values())
    notes = [f"not compared: {line}" for line in numbers["not_compared"]]
    notes += [f"meant to differ: {line}" for line in numbers["varying"]]
    for label, panel in panels.items():
        plays = "1 episode" if panel["repeats"] == 1 else f"{panel['repeats']} episodes"
        data = f"; data: {panel['data']}" if panel["data"] else ""
        notes.append(
            f"{label}: {panel['tasks']} tasks of {panel['split']}, {plays} of each, {numbers['decoding']}, "
            f"panel {panel['hash'][:12]}{data}"
        )
        notes += [
            f"{label}: {count} aborted episodes of {name}"
            for name, count in panel["aborted"].items()
            if count
        ]
        for name, found in panel["rows"][0]["differences"].items():
            if left_out := panel["tasks"] - found["tasks"]:
                notes.append(f"{label}: {left_out} tasks are left out of the difference of {name}")
    share = "its success (of several plays, the share that succeeded)" if repeated else "its success"
    test = " (of shares: the exact sign test over tasks)" if repeated else ""
    return [
        *notes,
        f"difference: mean over tasks of {share} minus that of the baseline, where both have plays that were "
        f"not aborted, in percentage points; [ ]: 95 % percentile bootstrap over tasks, {RESAMPLES:,} "
        "resamples, or a bound by Wilson's interval if all tasks differ alike",
        "gained, lost: tasks with a higher and a lower value than the baseline's; p: McNemar's exact test of "
        f"the two counts{test}, two-sided; neither is corrected for the number of rows and policies",
    ]


def _labelled_rows(numbers: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Yield each row with a label; the row of the success rate has that of the panel."""
    for label, panel in numbers["panels"].items():
        above = f"{label}, " if len(numbers["panels"]) > 1 else ""
        first, *others = panel["rows"]
        yield label, first
        for row in others:
            yield above + row["label"].replace("_", " "), row


def _score(score: Numbers) -> str:
    value = score["success_rate"] if "success_rate" in score else score["mean"]
    if value is None:
        return "–"
    low, high = score["interval"]
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _difference(found: Numbers) -> str:
    if found["mean"] is None:
        return "–"
    low, high = found["interval"]
    return f"{100 * found['mean']:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
