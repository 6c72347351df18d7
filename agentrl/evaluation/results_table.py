"""The scores of a run as a table in the terminal, and their formatting for tables and pages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from agentrl.terminal import plain

Tree = Mapping[str, Any]

_MAX_COLUMNS = 6  # task types shown as columns


def results_table(summary: Tree) -> RenderableType:
    """Return the success rates of each policy, overall and per task type, in percent with 95 % intervals.

    If there are more task types than fit in a terminal, they become the rows of a second table. Several
    environments have a table each.

    Args:
        summary: The content of a run's summary.json, of which only `policies` or `environments` is needed.
    """
    if "environments" in summary:
        parts = results_by_environment(summary).items()
        return Group(*(part for name, own in parts for part in (plain(name, "bold"), results_table(own))))
    policies = final_policies(summary)
    types = task_types(policies)
    if len(types) > _MAX_COLUMNS:
        return Group(_policies_table(summary, policies, []), _types_table(policies, types))
    return _policies_table(summary, policies, types)


def _types_table(policies: Mapping[str, Mapping[str, Tree]], types: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("success %", no_wrap=True)
    scores = [score for decodings in policies.values() for score in decodings.values()]
    for name, decodings in policies.items():
        for decoding in decodings:
            table.add_column(plain(f"{name}\n{decoding}"), justify="right")
    for kind in types:
        cells = [_terminal_cell(score["by_task_type"].get(kind), narrow=False, digits=0) for score in scores]
        table.add_row(*map(plain, (kind.replace("_", " "), *cells)))
    return table


def _policies_table(summary: Tree, policies: Mapping[str, Mapping[str, Tree]], types: Sequence[str]) -> Table:
    narrow = len(types) > 3  # put intervals below their rates, so that six task types fit in a terminal
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if narrow else 1, 0, 0), pad_edge=False)
    lines = _instruction_caption(summary)
    table.title = plain(panel_line(summary), "table.title")
    table.caption = plain(lines, "table.caption") if lines else None
    table.title_justify = table.caption_justify = "left"
    for name in ("policy", "decoding"):
        table.add_column(name, no_wrap=True)
    table.add_column("success %", justify="right", no_wrap=True)
    for name in (*(kind.replace("_", " ") for kind in types), "turns"):
        table.add_column(plain(name), justify="right")
    for name, decodings in policies.items():
        for index, (decoding, score) in enumerate(decodings.items()):
            cells = [_terminal_cell(score, narrow, digits=1)]
            cells += [_terminal_cell(score["by_task_type"].get(kind), narrow, digits=0) for kind in types]
            cells += [format_number(score.get("mean_turns"), 1)]
            last = index == len(decodings) - 1
            table.add_row(*map(plain, (name if index == 0 else "", decoding, *cells)), end_section=last)
    return table


def _terminal_cell(score: Tree | None, narrow: bool, digits: int) -> str:
    if score is None or score["success_rate"] is None:
        return "–"
    rate, low, high = (f"{100 * share:.{digits}f}" for share in (score["success_rate"], *score["interval"]))
    return f"{rate}\n{low}–{high.removesuffix('.0')}" if narrow else f"{rate} [{low}, {high}]"


def _instruction_caption(summary: Tree) -> str | None:
    lines = ["Given another goal for the same initial state, the trained policy reached"]
    for decoding, check in (summary.get("instruction_check") or {}).items():
        new, old = (" ".join(rate_and_interval(check[key])) for key in ("new_goal", "old_goal"))
        lines.append(f"{decoding:8} the new goal in {new} %, the panel's goal in {old} %")
    return "\n".join(lines) if len(lines) > 1 else None


def results_by_environment(summary: Tree) -> dict[str, Tree]:
    """Return the results in each environment by its name; an empty name stands for the only one."""
    return dict(summary.get("environments") or {"": summary})


def final_policies(summary: Tree) -> dict[str, dict[str, Any]]:
    """Return the policies to compare, without the points of the learning curve (`step-N`)."""
    return {
        name: decodings for name, decodings in summary.get("policies", {}).items() if step_of(name) is None
    }


def step_of(name: str) -> int | None:
    """Return the training step of a policy named `step-N`, else None."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else None


def task_types(policies: Mapping[str, Mapping[str, Tree]]) -> list[str]:
    """Return the task types of all scores, sorted."""
    return sorted(
        {
            kind
            for decodings in policies.values()
            for score in decodings.values()
            for kind in score["by_task_type"]
        }
    )


def rate_and_interval(score: Tree | None) -> tuple[str, str]:
    """Format a rate and its interval in percent, e.g. ("54.6", "[48.3, 60.8]")."""
    if score is None or score["success_rate"] is None:
        return "–", ""
    low, high = score["interval"]
    return _percent(score["success_rate"]), f"[{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def format_number(value: float | None, digits: int) -> str:
    """Format a number with fixed digits, and a missing one as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def panel_line(summary: Tree) -> str:
    """Describe the panel: its episodes, hash and data."""
    scores = [score for decodings in summary.get("policies", {}).values() for score in decodings.values()]
    if not scores:
        return ""
    first = scores[0]
    plays = first["episodes"] + first.get("aborted", 0)
    parts = (
        [f"{plays} episodes", f"panel {first['panel_hash'][:12]}"]
        if first.get("panel_hash")
        else [f"{plays} episodes"]
    )
    return ", ".join([*parts, *([line] if (line := data_line(summary)) else [])])


def data_line(summary: Tree) -> str:
    """Describe the data behind the tasks, as the environment labels it."""
    scores = (score for decodings in summary.get("policies", {}).values() for score in decodings.values())
    labels = sorted({str(score["data"]) for score in scores if score.get("data")})
    return f"data: {', '.join(labels)}" if labels else ""


def describe_usage(usage: Mapping[str, int], episodes: int) -> str:
    """Return what a chat server was asked and has counted."""
    tokens = usage["prompt_tokens"], usage["completion_tokens"]
    each = [f"{count / max(1, episodes):,.1f}" for count in (usage["requests"], *tokens)]
    uncounted = f" ({usage['uncounted']:,} answers without a count)" if usage["uncounted"] else ""
    return (
        f"server: {usage['requests']:,} requests ({usage['retries']:,} retries), {tokens[0]:,} prompt and "
        f"{tokens[1]:,} completion tokens{uncounted}; per episode {each[0]}, {each[1]} and {each[2]}"
    )
