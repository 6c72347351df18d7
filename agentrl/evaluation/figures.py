"""Figures of a report, as self-contained SVG images."""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agentrl.evaluation.statistics import Interval
from agentrl.terminal import printable

Row = Mapping[str, Any]
Point = tuple[int, float, Interval]  # step, success rate, its interval

COLOURS = {"sampled": "#2563eb", "greedy": "#d97706"}
GREY, INK = "#94a3b8", "#1e293b"
SERIES = ("#2563eb", "#d97706", "#059669", "#9333ea")
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9.5,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.hashsalt": "agentrl",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_success(policies: Mapping[str, Mapping[str, Row]]) -> str:
    """Draw the success rate of each policy and decoding with its interval.

    Args:
        policies: The scores by policy and decoding, each with `success_rate` and `interval`; the policies are
            shown from top to bottom.

    Returns:
        The image as a `data:` URI, as the other functions of this module do.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.9 + 0.46 * len(policies)), layout="constrained")
        axes = figure.subplots()
        for place, decodings in enumerate(policies.values()):
            for index, (decoding, score) in enumerate(decodings.items()):
                if score["success_rate"] is None:
                    continue
                height = place + (index - (len(decodings) - 1) / 2) * 0.3
                colour = COLOURS.get(decoding, GREY)
                _draw_interval(axes, score["success_rate"], height, score["interval"], decoding, colour)
        axes.set_yticks(range(len(policies)), [label_text(name) for name in policies])
        axes.set_ylim(len(policies) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("success rate, with its 95 % interval")
        axes.grid(axis="x")
        draw_legend(axes)
        return to_data_uri(figure)


def draw_differences(rows: Sequence[tuple[str, Mapping[str, Row]]], baseline: str) -> str:
    """Draw the difference of each policy to a baseline, with its interval.

    Args:
        rows: From top to bottom, a label and for each policy the difference, with `mean` and `interval`.
        baseline: The name of the baseline.
    """
    policies = list(dict.fromkeys(name for _, differences in rows for name in differences))
    colours = dict(zip(policies, SERIES * len(policies), strict=False))
    with mpl.rc_context(STYLE):
        height = 0.9 + (0.16 + 0.2 * len(policies)) * len(rows)
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.9)
        for place, (_, differences) in enumerate(rows):
            for name, found in differences.items():
                if found["mean"] is not None:
                    aside = (policies.index(name) - (len(policies) - 1) / 2) * 0.5 / len(policies)
                    _draw_interval(
                        axes, found["mean"], place + aside, found["interval"], label_text(name), colours[name]
                    )
        axes.set_yticks(range(len(rows)), [label_text(label) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}" if value else "0")
        axes.set_xlabel(f"difference to {label_text(baseline)} in percentage points, with its 95 % interval")
        axes.grid(axis="x")
        draw_legend(axes)
        return to_data_uri(figure)


def draw_learning_curve(
    rows: Sequence[Row],
    evaluations: Mapping[str, Sequence[Point]],
    environment: str = "",
    window: int = 9,
) -> str:
    """Draw the smoothed success rate of training, and the evaluations on the panel.

    Args:
        rows: The rows of the training stage in metrics.jsonl.
        evaluations: The points of each decoding.
        environment: The name of one of several environments.
        window: The window of the centred moving mean, in steps.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.1), layout="constrained")
        axes = figure.subplots()
        room = f"rollout/{environment}" if environment else "rollout"
        steps, values = _series(rows, f"train/{room}/success_rate")
        axes.plot(steps, values, color=GREY, alpha=0.45, linewidth=0.8)
        axes.plot(
            steps,
            moving_mean(values, window),
            color=INK,
            linewidth=1.6,
            label=f"training tasks, mean of {window} steps",
        )
        for place, (decoding, points) in enumerate(evaluations.items()):
            aside = (
                0.006 * max(steps, default=0) * (2 * place - len(evaluations) + 1)
            )  # so that the points of one decoding do not cover another's
            for index, (step, rate, (low, high)) in enumerate(points):
                axes.errorbar(
                    step + aside,
                    rate,
                    yerr=[[rate - low], [high - rate]],
                    fmt="o",
                    markersize=5,
                    capsize=3,
                    color=COLOURS.get(decoding, GREY),
                    label=f"held-out panel, {decoding}" if index == 0 else None,
                )
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("step of reinforcement learning")
        axes.set_ylabel("success rate")
        axes.grid(axis="y")
        draw_legend(axes)
        return to_data_uri(figure)


def draw_entropy_over_steps(rows: Sequence[Row]) -> str:
    """Draw the mean entropy per token, turn and trajectory over the training steps."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 2.9), layout="constrained")
        axes = figure.subplots()
        for level, colour in (("token", "#2563eb"), ("turn", "#059669"), ("trajectory", "#9333ea")):
            steps, values = _series(rows, f"train/rollout/entropy/{level}")
            if values:
                axes.plot(steps, moving_mean(values, 5), color=colour, linewidth=1.4, label=level)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step of reinforcement learning")
        axes.set_ylabel("entropy of sampled tokens, nats")
        axes.grid(axis="y")
        draw_legend(axes)
        return to_data_uri(figure)


def draw_signals(rows: Sequence[Row], environments: Collection[str] = ()) -> str | None:
    """Draw the metrics that no other figure shows in a grid of small panels.

    Metrics with a common prefix are placed next to each other; numbered turns and task types share a panel.
    Metrics that never change are left out, and those of one of several environments.

    Args:
        rows: The rows of the training stage in metrics.jsonl.
        environments: The names of several environments.

    Returns:
        The image as a `data:` URI; None if there is nothing to show.
    """
    kinds: dict[str, dict[str, list[str]]] = {}
    own = tuple(f"train/rollout/{name}/" for name in environments if name)
    known = (name for row in rows for name in row if _is_signal(name) and not name.startswith(own))
    for name in dict.fromkeys(known):
        if len(set(_series(rows, name)[1])) > 1:
            panel = _panel_name(name)
            kinds.setdefault(panel.rpartition("/")[0], {}).setdefault(panel, []).append(name)
    panels = [panel for kind in kinds.values() for panel in kind.items()]
    if not panels:
        return None
    with mpl.rc_context(STYLE | {"axes.titlesize": 7.5, "font.size": 6.5}):
        lines = -(-len(panels) // 4)
        figure = Figure(figsize=(7.6, 1.25 * lines), layout="constrained")
        grid = figure.subplots(lines, 4, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (panel, names) in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, {name: _series(rows, name) for name in names})
        return to_data_uri(figure)


def _draw_panel(axes: Axes, title: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """Draw one curve with its moving mean, or the moving means of several from light to dark."""
    last = len(curves) - 1
    for index, (name, (steps, values)) in enumerate(sorted(curves.items())):
        colour, label = INK, None
        if not last:
            axes.plot(steps, values, color=GREY, alpha=0.5, linewidth=0.6)
        else:
            colour = to_hex(mpl.colormaps["viridis_r"](0.1 + 0.9 * index / last))
            label = label_text(name.rpartition("/")[2]) if index in (0, last) or last < 6 else None
        axes.plot(steps, moving_mean(values, 9), color=colour, linewidth=1.1, label=label)
    if last:
        axes.legend(fontsize=5, handlelength=0.8, borderpad=0, labelspacing=0.1)
    axes.set_title(label_text((title if last else next(iter(curves))).removeprefix("train/")))
    axes.grid(axis="y")


def draw_entropy_by_turn(by_turn: Mapping[str, Sequence[float]]) -> str:
    """Draw the entropy of each turn of an episode on the panel.

    Args:
        by_turn: The mean entropies of the first, second, … turn of each policy.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 2.9), layout="constrained")
        axes = figure.subplots()
        colours = dict(zip(by_turn, (GREY, "#059669", "#2563eb", "#9333ea") * len(by_turn), strict=False))
        for name, values in by_turn.items():
            turns = range(1, len(values) + 1)
            axes.plot(
                turns, values, "o-", markersize=3, linewidth=1.3, color=colours[name], label=label_text(name)
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("turn of the episode (sampled)")
        axes.set_ylabel("entropy of sampled tokens, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        draw_legend(axes)
        return to_data_uri(figure)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centred moving mean over `window` values, over fewer at the ends.

    >>> moving_mean([0.0, 3.0, 6.0], window=3)
    [1.5, 3.0, 4.5]
    """
    half = window // 2
    around = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(near) / len(near) for near in around]


_SIGNALS = (
    "train/learner/",
    "train/algorithm/",
    *(
        f"train/rollout/{name}"
        for name in (
            "branches/",
            "staleness/",
            "stop/",
            "groups_kept",
            "rounds",
            "invalid_rate",
            "turns_mean",
        )
    ),
)


def _is_signal(name: str) -> bool:
    """Return whether a metric belongs into the grid of signals: no other figure shows it."""
    return _is_by_task_type(name) or name.startswith(_SIGNALS)


def _is_by_task_type(name: str) -> bool:
    """Return whether a metric is of one task type, as success_rate/TYPE and entropy/turn/TYPE."""
    return bool(re.match("train/rollout/(success_rate|entropy/[a-z]+)/", name))


def _panel_name(name: str) -> str:
    """Return the panel of a metric: numbered turns, task types and stop reasons share one."""
    head, _, last = name.rpartition("/")
    return f"{head}/*" if last.isdigit() or head == "train/rollout/stop" or _is_by_task_type(name) else name


def _series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _draw_interval(
    axes: Axes, value: float, height: float, interval: Interval, label: str, colour: str
) -> None:
    low, high = interval
    axes.errorbar(
        value,
        height,
        xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        fmt="o",
        markersize=5,
        capsize=3,
        color=colour,
        label=label,
    )


def draw_legend(axes: Axes) -> None:
    """Draw a legend with one entry per label above the axes, if there are labels."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            unique.values(),
            unique,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=3,
            handlelength=1.4,
            borderpad=0,
        )


def label_text(text: str) -> str:
    """Escape what matplotlib reads as mathematics (`$`) or as a hidden label (a leading `_`)."""
    return re.sub(r"^_", " _", printable(text).replace("$", r"\$"))


def to_data_uri(figure: Figure) -> str:
    """Return a figure as the `data:` URI of an SVG image."""
    stream = BytesIO()
    # A transparent background suits both the light and the dark page.
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
