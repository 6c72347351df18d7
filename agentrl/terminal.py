"""Print untrusted text safely: no control sequence reaches the terminal, and nothing is parsed as markup.

Everything that agentrl prints goes through `echo` or a `Terminal`, and thereby through `printable`.
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

# C0 and C1 controls except newline and tab, bidirectional controls, Unicode line separators, and surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Replace every control character except newline and tab with the replacement character.

    >>> printable("\x1b[31mred")
    '�[31mred'
    """
    return _CONTROL.sub("�", text.replace("\r\n", "\n"))


def plain(text: object, style: str = "") -> Text:
    """Return a rich `Text` that is printed literally, without markup."""
    return Text(printable(str(text)), style=style)


def echo(text: object = "", *, err: bool = False, nl: bool = True, style: str = "") -> None:
    """Print a line of text.

    Args:
        text: The text to print.
        err: Whether to print to standard error.
        nl: Whether to end the line.
        style: A rich style such as "bold red"; ignored if the output is not a terminal.
    """
    import typer

    shown = printable(str(text))
    if style:
        *bold, colour = style.split()
        typer.secho(shown, err=err, nl=nl, fg=colour, bold=bool(bold))
    else:
        typer.echo(shown, err=err, nl=nl)


class Terminal(Console):
    """Rich console that prints all text literally, including the text inside renderables."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Render to segments without control characters."""
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print Python warnings without control characters inside a `with` block."""

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
