"""Comparison of methods as tables in the terminal and in Markdown, and as a figure."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from agentrl.evaluation.statistics import Interval
from agentrl.files import write_atomic
from agentrl.study.comparison import DECODINGS, format_range
from agentrl.terminal import plain, printable

Tree = Mapping[str, Any]
Curve = Mapping[str, Sequence[float]]  # `step` and `value`
Curves = Mapping[str, Curve]
Rows = Sequence[Sequence[str]]  # the first one is the head

# The metrics drawn for each method, with label and colour.
_PANELS = (
    ("train/rollout/entropy/trajectory", "entropy, nats", "#9333ea"),
    ("train/rollout/success_rate", "success rate", "#2563eb"),
)
_GREY = "#94a3b8"
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 8.5,
    "grid.color": "#e2e8f0",
    "svg.hashsalt": "agentrl",
}


def write_comparison(folder: Path, results: Tree, console: Console) -> None:
    """Write `results.json`, `table.md` and `study.svg` into a folder, and print the tables.

    Args:
        folder: The folder of the study.
        results: The results, as `compare` returns them.
        console: The console to print to.

    Raises:
        OSError: If the disk is full; older files are left as they were.
    """
    write_atomic(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    tables = [_success_table(results), _runs_table(results)]
    notes = [
        *results["warnings"],
        *(f"failed: {name}: {why}" for name, why in results.get("failed", {}).items()),
    ]
    blocks = [_markdown(rows) for rows in tables] + [f"- {_markdown_text(note)}" for note in notes]
    blocks += ["![Entropy and success while training](study.svg)", *map(_markdown_text, results["caption"])]
    write_atomic(folder / "table.md", "\n\n".join(blocks) + "\n")
    curves = {
        name: [run["curves"] for run in found["runs"].values()]
        for name, found in results["methods"].items()
        if name != results["clone"]
    }
    if curves:
        write_atomic(folder / "study.svg", draw_methods(curves, results["baseline"]))
    for rows in tables:
        console.print(_terminal(rows))
    for line in (*(f"warning: {note}" for note in results["warnings"]), *results["caption"]):
        console.print(plain(line), highlight=False)
    console.print(plain(f"{folder}: results.json, table.md, study.svg"), highlight=False, soft_wrap=True)


def draw_methods(methods: Mapping[str, Sequence[Curves]], baseline: str) -> str:
    """Draw entropy and success over training, a pair of panels per method, all on the same scales.

    Args:
        methods: For each method and seed, the curves `entropy/trajectory` and `success`.
        baseline: The method whose mean over seeds is drawn as a dashed line in the panels of the others.

    Returns:
        An SVG image.
    """
    pairs = 2 if len(methods) > 1 else 1
    rows = -(-len(methods) // pairs)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4 * pairs, 0.5 + 1.75 * rows), layout="constrained")
        grid = figure.subplots(rows, 2 * pairs, sharex=True, squeeze=False)
        for place, name in enumerate(methods):
            row, pair = divmod(place, pairs)
            for axes, (key, label, colour) in zip(grid[row, 2 * pair :], _PANELS, strict=False):
                for run in methods[name]:
                    axes.plot(run[key]["step"], run[key]["value"], color=colour, alpha=0.35, linewidth=0.8)
                if name != baseline:
                    rival = _mean_curve([run[key] for run in methods.get(baseline, ())])
                    axes.plot(*rival, color=_GREY, linewidth=1.4, linestyle="--")
                axes.plot(*_mean_curve([run[key] for run in methods[name]]), color=colour, linewidth=1.8)
                axes.set_ylabel(label)
                axes.grid(axis="y")
            grid[row, 2 * pair].set_title(name)
        used = grid.flatten()[: 2 * len(methods)]
        for axes in grid.flat[len(used) :]:
            axes.remove()
        for axes in used[-2 * pairs :]:
            axes.tick_params(labelbottom=True)
        highest = max(axes.get_ylim()[1] for axes in used[::2])
        for entropy, success in zip(used[::2], used[1::2], strict=True):
            entropy.set_ylim(0, highest)
            success.set_ylim(-0.02, 1.02)
        figure.supxlabel(
            f"step of reinforcement learning; thin: each seed; dashed: mean of {baseline}", size=9
        )
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _mean_curve(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Return the mean of the curves at each step that all of them have."""
    known = [dict(zip(curve["step"], curve["value"], strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, known))) if known else []
    return steps, [fmean(values[step] for values in known) for step in steps]


def _success_table(results: Tree) -> Rows:
    head = ["method", *(f"{decoding}{what}" for decoding in DECODINGS for what in (" %", "\ndifference"))]
    rows = [head]
    for name, found in results["methods"].items():
        cells = [_label(results, name)]
        for decoding in DECODINGS:
            score = found[decoding]
            difference = score.get("difference") or {"value": None}
            cells += [
                _format_estimate(score["value"], score["interval"], "{:.1f}", "{:.0f}"),
                _format_estimate(difference["value"], difference.get("interval"), "{:+.1f}", "{:+.0f}"),
            ]
        rows.append(cells)
    return rows


def _runs_table(results: Tree) -> Rows:
    head = ["method", *(f"{decoding} %\nby seed" for decoding in DECODINGS)]
    rows = [[*head, "episodes", "updates", "replayed", "aborted", "CPU"]]
    for name, found in results["methods"].items():
        runs = found["runs"].values()
        cells = [name]
        for decoding in DECODINGS:
            rates = found[decoding]["by_seed"].values()
            cells.append("/".join("–" if rate is None else f"{100 * rate:.1f}" for rate in rates))
        cells += [
            format_range({run[key] for run in runs}) for key in ("episodes", "updates", "replay_updates")
        ]
        cells.append(str(sum(sum(run["aborted"].values()) for run in runs)))
        cells.append(f"{fmean(run['cpu_seconds'] for run in runs):.0f}")
        rows.append(cells)
    return rows


def _label(results: Tree, name: str) -> str:
    return name + {results["baseline"]: " (baseline)", results["clone"]: " (start)"}.get(name, "")


def _format_estimate(value: float | None, interval: Interval | None, middle: str, end: str) -> str:
    if value is None or interval is None:
        return "–"
    low, high = (end.format(100 * share) for share in interval)
    return f"{middle.format(100 * value)} [{low}, {high}]"


def _markdown(rows: Rows) -> str:
    head, *rest = ([_markdown_text(cell).replace("|", r"\|") for cell in cells] for cells in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rest))


def _markdown_text(text: str) -> str:
    """Escape a text so that Markdown shows it as one plain line."""
    line = " ".join(printable(text).split("\n"))
    return re.sub(r"[`\\]|(?<=\])(?=[(\[])", r"\\\g<0>", html.escape(line, quote=False))


def _terminal(rows: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(plain(name), justify="right" if index else "left", no_wrap=True)
    for cells in rows[1:]:
        table.add_row(*map(plain, cells))
    return table
