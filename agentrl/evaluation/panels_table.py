"""The scores of policies on several panels as one table, for the terminal and in Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table

from agentrl.evaluation.panel_lists import OpenedPanel
from agentrl.evaluation.results_table import describe_usage
from agentrl.evaluation.scores import Evaluation
from agentrl.evaluation.several import PanelScore
from agentrl.evaluation.statistics import Interval, Rate, TaskMean
from agentrl.terminal import plain, printable

Scores = Mapping[str, Sequence[PanelScore]]  # by policy, one for each panel


@dataclass(frozen=True)
class Row:
    """A line of the table: a panel, or below it what is measured there, with a cell for each policy."""

    label: str
    cells: tuple[str, ...]
    heading: bool = False


def table_rows(scores: Scores) -> list[Row]:
    """Return a row for each panel, and below it the pass rates, the means and the task types.

    There is no mean over panels: their tasks have nothing in common.
    """
    panels = zip(*scores.values(), strict=True)
    return [row for of_panel in panels for row in _panel_rows(list(scores), of_panel)]


def panels_table(scores: Scores) -> Table:
    """Return the table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("success %", overflow="fold", max_width=44)
    for name in scores:
        table.add_column(plain(name), justify="right", overflow="fold")
    for index, row in enumerate(table_rows(scores)):
        if row.heading and index:
            table.add_section()
        label = plain(row.label, "bold") if row.heading else plain(f"  {row.label}")
        table.add_row(label, *map(plain, row.cells))
    return table


def results_markdown(scores: Scores, title: str, notes: Sequence[str]) -> str:
    """Return the table and its notes as Markdown."""
    lines = [["success %", *scores], ["---", *("---:" for _ in scores)]]
    for row in table_rows(scores):
        lines.append([f"**{_cell(row.label)}**" if row.heading else _cell(row.label), *map(_cell, row.cells)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    listed = "\n".join(f"- {printable(note)}" for note in notes)
    return f"{printable(title)}\n\n{table}\n\n{listed}\n"


def panel_notes(panels: Sequence[OpenedPanel], scores: Scores) -> list[str]:
    """Return a line for each panel that was opened, and for each reason why episodes were aborted."""
    notes = []
    for opened in panels:
        if opened.panel is not None:
            panel = opened.panel
            data = f"; data: {opened.data}" if opened.data else ""
            notes.append(
                f"{opened.label}: {len(panel.tasks)} tasks of {panel.split}, panel {panel.hash[:12]}{data}"
            )
    for policy, found in scores.items():
        for score in found:
            reasons = score.evaluation.aborted_reasons if score.evaluation else {}
            notes += [f"{score.label}, {policy}: aborted {n} x {why}" for why, n in reasons.items()]
            if score.evaluation and score.evaluation.usage:
                played = sum(score.evaluation.stop_reasons.values())
                notes.append(f"{score.label}, {policy}: {describe_usage(score.evaluation.usage, played)}")
    return notes


def _panel_rows(policies: Sequence[str], scores: Sequence[PanelScore]) -> Iterator[Row]:
    def cells(show: Callable[[Evaluation], str]) -> tuple[str, ...]:
        return tuple("–" if each.evaluation is None else show(each.evaluation) for each in scores)

    yield Row(scores[0].label, cells(lambda each: _rate(each.success)), heading=True)
    for line in _reasons(policies, scores):
        yield Row(line, ("",) * len(scores))
    played = [each.evaluation for each in scores if each.evaluation is not None]
    if not played:
        return
    for k in dict.fromkeys(k for each in played for k in each.pass_at if k > 1):
        yield Row(f"pass@{k}", cells(partial(_pass_at, k)))
        yield Row(f"pass^{k}", cells(partial(_pass_hat, k)))
    yield Row("mean return", cells(lambda each: _number(each.mean_return, 2)))
    yield Row("turns", cells(lambda each: _number(each.mean_turns, 1)))
    if any(each.aborted for each in played):
        yield Row("aborted", cells(lambda each: f"{each.aborted} of {each.aborted + each.success.episodes}"))
    for kind in sorted({kind for each in played for kind in each.by_task_type}):
        yield Row(kind.replace("_", " "), cells(partial(_of_type, kind)))


def _reasons(policies: Sequence[str], scores: Sequence[PanelScore]) -> list[str]:
    """Return why a panel was not played, with the policy if that concerns some of them alone."""
    if len({score.error for score in scores}) == 1:
        return [f"not played: {score.error}" for score in scores[:1] if score.error is not None]
    return [
        f"not played by {policy}: {score.error}"
        for policy, score in zip(policies, scores, strict=True)
        if score.error is not None
    ]


def _pass_at(k: int, scores: Evaluation) -> str:
    return _rate(scores.pass_at[k])


def _pass_hat(k: int, scores: Evaluation) -> str:
    return _rate(scores.pass_hat[k])


def _of_type(kind: str, scores: Evaluation) -> str:
    return _rate(scores.by_task_type.get(kind))


def _rate(rate: Rate | TaskMean | None) -> str:
    value = None if rate is None else rate.success_rate if isinstance(rate, Rate) else rate.mean
    return "–" if rate is None or value is None else f"{100 * value:.1f} {_interval(rate.interval)}"


def _interval(interval: Interval) -> str:
    low, high = (f"{100 * end:.0f}" for end in interval)
    return f"[{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("\n", " ")
