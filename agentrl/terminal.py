"""Write to a terminal what came from outside: nothing in it steers the terminal, or is read as markup.

Everything that agentrl prints goes through `echo` or a `Terminal`, and so through `printable`.
"""

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

# C0 and C1 but for newline and tab, what turns the direction of writing, other ends of lines, and surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return a text in which a sign stands for each control character but newline and tab.

    >>> printable("\x1b[31mred")
    '�[31mred'
    """
    return _STEERING.sub("�", text.replace("\r\n", "\n"))


def plain(text: object, style: str = "") -> Text:
    """Return what rich prints as it is written."""
    return Text(printable(str(text)), style=style)


def echo(text: object = "", *, err: bool = False, nl: bool = True, style: str = "") -> None:
    """Print a line of text; in a style, such as "bold red", where a terminal shows it."""
    import typer

    shown = printable(str(text))
    if style:
        *bold, colour = style.split()
        typer.secho(shown, err=err, nl=nl, fg=colour, bold=bool(bold))
    else:
        typer.echo(shown, err=err, nl=nl)


class Terminal(Console):
    """A console that takes text for text, wherever a renderable brings it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not _STEERING.search(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Have warnings printed by `echo`."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        text = printable(warnings.formatwarning(message, category, filename, lineno, line))
        (file or sys.stderr).write(text)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before
