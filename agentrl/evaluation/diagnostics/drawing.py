"""Figures of the diagnostics, as self-contained SVG images; loads matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from agentrl.evaluation.diagnostics.findings import Numbers
from agentrl.evaluation.figures import GREY, INK, STYLE, draw_legend, label_text, to_data_uri

_BLUE, _ORANGE = "#2563eb", "#d97706"


def draw_leash(numbers: Numbers) -> str:
    """Draw pass@k of a trained policy and its base over k, with 95 % bands over tasks.

    Args:
        numbers: What `measure_leash` returns.
    """
    panels: Mapping[str, Any] = numbers["panels"]
    colours = {numbers["base"]: ("base", GREY), numbers["trained"]: ("trained", _BLUE)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * max(1, len(panels)), 3.0), layout="constrained")
        grid = figure.subplots(1, max(1, len(panels)), squeeze=False)
        for axes, (label, panel) in zip(grid.flat, panels.items(), strict=False):
            for name, own in panel["policies"].items():
                kind, colour = colours[name]
                known = {int(k): rate for k, rate in own["pass_at"].items() if rate["mean"] is not None}
                _draw_band(
                    axes,
                    list(known),
                    [rate["mean"] for rate in known.values()],
                    [rate["interval"] for rate in known.values()],
                    colour,
                    kind,
                )
            axes.set_xscale("log", base=2)
            ks = [int(k) for k in next(iter(panel["policies"].values()))["pass_at"]]
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.set_xlabel(f"k, {label_text(label)}")
            axes.set_ylabel("pass@k")
            axes.grid(axis="y")
            draw_legend(axes)
        return to_data_uri(figure)


def draw_expert_entropy(numbers: Numbers) -> str:
    """Draw the entropy of the expert's last action over the share of an episode that is played.

    Args:
        numbers: What `measure_expert_entropy` returns.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.subplots()
        for outcome, colour in (("solved", _BLUE), ("failed", _ORANGE)):
            found = numbers["outcomes"][outcome]
            if found["curve"]:
                means = found["curve"]
                shares = [index / (len(means) - 1) for index in range(len(means))]
                label = f"{outcome}, {found['episodes']} episodes"
                _draw_band(axes, shares, means, found["band"], colour, label, marker="")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("turns played, from the first to the last")
        axes.set_ylabel("entropy of the expert's last action, nats")
        axes.grid(axis="y")
        draw_legend(axes)
        return to_data_uri(figure)


def draw_template_collapse(numbers: Numbers) -> str:
    """Draw the mutual information of prompts and replies, and the entropies, over the training steps.

    Args:
        numbers: What `measure_template_collapse` returns.
    """
    found: Sequence[Mapping[str, Any]] = numbers["policies"]
    steps = [each["step"] for each in found]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        information, entropy = figure.subplots(1, 2)
        most = [each["most"] for each in found]
        _draw_line(information, steps, [each["mutual_information"] for each in found], _BLUE, "MI(X; Z)")
        information.plot(steps, most, "--", color=GREY, linewidth=1.0, label="log N")
        information.set_ylabel("nats")
        _draw_line(entropy, steps, [each["conditional_entropy"] for each in found], INK, "H(Z | X)")
        _draw_line(entropy, steps, [each["marginal_entropy"] for each in found], GREY, "H(Z)")
        entropy.set_ylabel("nats per reply")
        for axes in (information, entropy):
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.set_xlabel("step of reinforcement learning")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y")
            draw_legend(axes)
        return to_data_uri(figure)


def _draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axes.plot(x, y, "o-", markersize=3, linewidth=1.3, color=colour, label=label)


def _draw_band(
    axes: Axes,
    x: Sequence[float],
    means: Sequence[float],
    intervals: Sequence[Sequence[float]],
    colour: str,
    label: str,
    marker: str = "o",
) -> None:
    """Draw means with a band between the ends of their intervals."""
    axes.plot(x, means, marker=marker, markersize=3, linewidth=1.3, color=colour, label=label)
    if intervals:
        low, high = zip(*intervals, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
