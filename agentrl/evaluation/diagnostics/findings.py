"""Findings of a diagnostic: a table of its numbers, and the files that keep them."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from agentrl.files import write_atomic
from agentrl.terminal import plain, printable

Numbers = Mapping[str, Any]

FOLDER = "diagnostics"  # in the folder of a run


@dataclass(frozen=True)
class Findings:
    """Result of a diagnostic, as a table.

    Args:
        title: What was measured.
        columns: The heads of the table.
        rows: Its rows.
        notes: Lines that say how it was measured.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def to_table(self) -> Table:
        """Return the table for a terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, name in enumerate(self.columns):
            table.add_column(plain(name), justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(plain, row))
        return table

    def to_markdown(self) -> str:
        """Return the title, the table and the notes as Markdown."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        return f"{printable(self.title)}\n\n{table}\n\n" + "".join(
            f"- {_cell(note)}\n" for note in self.notes
        )


def write_findings(
    folder: Path, name: str, numbers: Numbers, findings: Findings, draw: Callable[[Numbers], str]
) -> None:
    """Write NAME.json, NAME.md and NAME.svg to a folder, which is created if it is missing.

    Args:
        folder: The folder.
        name: The name of the files.
        numbers: The numbers, as JSON values.
        findings: The table.
        draw: Draws the numbers as a `data:` URI of an SVG image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", json.dumps(numbers, indent=1))
    write_atomic(folder / f"{name}.md", findings.to_markdown())
    image = base64.b64decode(draw(numbers).partition(",")[2])
    write_atomic(folder / f"{name}.svg", image.decode())


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with fixed digits, and a missing one as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("\n", " ")
