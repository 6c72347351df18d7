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
from agentrl.study.comparison import DECODINGS, VERDICTS, format_range
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
    # Sampled success comes first: it is what is trained, and what settings are chosen by.
    tables = [
        *(_success_table(results, decoding) for decoding in reversed(DECODINGS)),
        _seeds_table(results),
        _cost_table(results),
    ]
    opening = _verdict_sentences(results)
    notes = [
        *(f"failed: {name}: {why}" for name, why in results.get("failed", {}).items()),
        *_missing_sentences(results),
        *results["warnings"],
    ]
    tuned = [
        found["sentence"] for found in results.get("tuning", {}).values() if any(found["scores"].values())
    ]
    blocks = [
        *([" ".join(map(_markdown_text, opening))] if opening else []),
        *(_markdown(rows) for rows in tables),
        *(f"- {_markdown_text(note)}" for note in notes),
        *(f"- tuned on other seeds, {_markdown_text(line)}" for line in tuned),
    ]
    blocks += ["![Entropy and success while training](study.svg)", *map(_markdown_text, results["caption"])]
    write_atomic(folder / "table.md", "\n\n".join(blocks) + "\n")
    curves = {
        name: [run["curves"] for run in results["methods"][name]["runs"].values()]
        for name in _shown_order(results)
        if name != results["clone"]
    }
    if curves:
        write_atomic(folder / "study.svg", draw_methods(curves, results["baseline"]))
    for rows in tables:
        console.print(_terminal(rows))
    for line in (*opening, *(f"warning: {note}" for note in notes), *results["caption"]):
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


def _shown_order(results: Tree) -> list[str]:
    """Return the names of the runs: start and baseline, then what cannot be told from the baseline."""
    first = [name for name in (results["clone"], results["baseline"]) if name in results["methods"]]
    told = [name for found in VERDICTS for name in results.get(found, ())]
    rest = [name for name in results["methods"] if name not in {*first, *told}]
    return [*first, *told, *rest]


def _verdict_sentences(results: Tree) -> list[str]:
    words = {
        "alike": "Cannot be told from {} in sampled success",
        "lower": "Lower than {}",
        "higher": "Higher than {}",
    }
    return [
        f"{words[found].format(results['baseline'])}: "
        f"{'; '.join(_label(results, name) for name in results[found])}."
        for found in VERDICTS
        if results.get(found)
    ]


def _missing_sentences(results: Tree) -> list[str]:
    """Say which runs of the tuning have not finished; `warnings` says it of the comparison."""
    missing = results.get("missing", {}).get("tuning", {})
    tuning = results.get("tuning", {})
    untouched = [method for method, found in tuning.items() if not any(found["scores"].values())]
    started = {
        name for method, found in tuning.items() if method not in untouched for name in found["scores"]
    }
    return [
        *([f"not tuned yet: {', '.join(untouched)}"] if untouched else []),
        *(
            f"{name}: tuning not finished on {', '.join(map(str, seeds))}"
            for name, seeds in missing.items()
            if name in started
        ),
    ]


def _success_table(results: Tree, decoding: str) -> Rows:
    rows = [["method", f"{decoding} %", "difference\nover games", "difference\nover seeds"]]
    for name in _shown_order(results):
        score = results["methods"][name][decoding]
        difference = score.get("difference") or {"value": None}
        over_seeds = difference.get("over_seeds") or {"mean": None, "interval": None}
        rows.append(
            [
                _label(results, name),
                _format_estimate(score["value"], score["interval"], "{:.1f}", "{:.0f}"),
                _format_estimate(difference["value"], difference.get("interval"), "{:+.1f}", "{:+.0f}"),
                _format_estimate(over_seeds["mean"], over_seeds["interval"], "{:+.1f}", "{:+.0f}"),
            ]
        )
    return rows


def _seeds_table(results: Tree) -> Rows:
    shown = ("sampled", "greedy")
    rows = [
        ["method", *(f"{kind} %\nby seed" for kind in shown), "while training\n%", "difference\nover seeds"]
    ]
    for name in _shown_order(results):
        found = results["methods"][name]
        cells = [_label(results, name)]
        for kind in shown:
            rates = found[kind]["by_seed"].values()
            cells.append("/".join("–" if rate is None else f"{100 * rate:.0f}" for rate in rates))
        training = found.get("training") or {"value": None}
        over_seeds = (training.get("difference") or {}).get("over_seeds") or {"mean": None, "interval": None}
        cells.append("–" if training["value"] is None else f"{100 * training['value']:.1f}")
        cells.append(_format_estimate(over_seeds["mean"], over_seeds["interval"], "{:+.1f}", "{:+.0f}"))
        rows.append(cells)
    return rows


def _cost_table(results: Tree) -> Rows:
    head = ["method", "episodes", "effective", "taught\ntokens", "updates", "replayed", "aborted", "CPU"]
    rows = [head]
    for name in _shown_order(results):
        runs = list(results["methods"][name]["runs"].values())
        ranges = {
            key: format_range({run[key] for run in runs}) for key in ("episodes", "updates", "replay_updates")
        }
        means = {
            key: _mean_count([run.get(key) for run in runs])
            for key in ("effective_episodes", "taught_tokens")
        }
        rows.append(
            [
                _label(results, name),
                ranges["episodes"],
                means["effective_episodes"],
                means["taught_tokens"],
                ranges["updates"],
                ranges["replay_updates"],
                str(sum(sum(run["aborted"].values()) for run in runs)),
                f"{fmean(run['cpu_seconds'] for run in runs):.0f}",
            ]
        )
    return rows


def _mean_count(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{fmean(known):,.0f}" if known else "–"


def _label(results: Tree, name: str) -> str:
    kind = {results["baseline"]: " (baseline)", results["clone"]: " (start)"}.get(name, "")
    setting = results.get("settings", {}).get(name)
    if setting is None or not setting["label"]:
        return name + kind
    chosen = results["tuning"][setting["method"]]["chosen"] == name
    words = [setting["label"], *(["own"] if setting["default"] else []), *(["chosen"] if chosen else [])]
    return f"{setting['method']}{kind}, {', '.join(words)}"


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
        # Only names may wrap: a number without its end would be another number.
        justify: Any = "right" if index else "left"
        table.add_column(plain(name), justify=justify, no_wrap=bool(index), overflow="fold")
    for cells in rows[1:]:
        table.add_row(*map(plain, cells))
    return table
