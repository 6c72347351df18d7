"""What a run says while it goes: `metrics.jsonl`, one row per step, and a line of progress for who waits."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from agentrl.errors import CheckpointError
from agentrl.files import replacing
from agentrl.terminal import Terminal, plain, printable

Row = Mapping[str, Any]

# Metric -> how the progress line names and prints it, in this order.
_SHOWN_METRICS = {
    "success": "success {:.3f}",
    "return": "return {:.3f}",
    "loss": "loss {:.3f}",
    "entropy/token": "entropy {:.3f}",
    "aborted": "aborted {:.1%}",
    "stop/context_limit": "context full {:.1%}",
}
_SHOWN_IF_NONZERO = ("aborted", "stop/context_limit")


class RunLogger:
    """Appends to `metrics.jsonl` and shows progress: live in a terminal, else a plain line every few seconds.

    Args:
        folder: of the run.
        quiet: write the file and show nothing. With the logger `agentrl` above INFO, warnings and results
            are shown, and no progress.
        console: where to show; standard output unless told.
        seconds_between_lines: least time between two plain lines of one stage.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        quiet: bool = False,
        console: Console | None = None,
        seconds_between_lines: float = 5.0,
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._console = console or Terminal(quiet=quiet)
        self._progress = logging.getLogger("agentrl").level <= logging.INFO
        self._line_interval = seconds_between_lines
        self._file: TextIO | None = None
        self._stage: _Stage | None = None

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_: object) -> None:
        file, self._file = self._file, None
        if file is not None:
            with self._with_path_in_errors():
                file.close()

    @contextmanager
    def _with_path_in_errors(self) -> Iterator[None]:
        """A disk that is full says so without saying where."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def write(self, row: Row, *, seconds: float | None = None) -> None:
        """Append a row and show it.

        Args:
            row: JSON values; `step` counts the stage's finished steps. What is not finite is written as null.
            seconds: that the row's `reply_tokens` took; only shown, for a row must not depend on the clock.

        Raises:
            OSError: when the disk is full; the rows before stay readable.
            CheckpointError: when the file was removed since the row before.
        """
        finite = {key: None if _is_not_finite(value) else value for key, value in row.items()}
        with self._with_path_in_errors():
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            if not os.fstat(self._file.fileno()).st_nlink:
                raise CheckpointError(
                    f"{self.path}: was removed while the run went on; resume it to write the rows since its "
                    "last checkpoint again, or start a new run"
                )
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        if self._stage is not None:
            self._stage.numbers = _format_metrics(finite, seconds)
            self.advance(int(row.get("step", self._stage.done + 1)))

    def truncate(self, stage: str, step: int) -> None:
        """Forget what was logged after `step` of `stage`: a resumed run writes it again.

        What stands before, of other stages too, stays. Without a row up to `step`, the file is cut where the
        stage begins; `start` is before every stage.
        """
        rows = read_metrics(self.path)
        of_stage = [
            (index, row.get("step", 0)) for index, row in enumerate(rows) if row.get("stage") == stage
        ]
        before = [index + 1 for index, done in of_stage if done <= step]
        after = [index for index, done in of_stage if done > step]
        end = 0 if stage == "start" else before[-1] if before else after[0] if after else len(rows)
        self.__exit__()
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows[:end]), encoding="utf-8")

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        if self._file is not None:
            with self._with_path_in_errors():
                os.fsync(self._file.fileno())

    @contextmanager
    def stage(self, name: str, total: int | None = None, done: int = 0) -> Iterator[None]:
        """Show the progress of what happens inside; a stage within a stage is shown below it.

        Args:
            name: what is being done.
            total: steps of the whole stage, if known.
            done: steps that were finished before, in an interrupted run.
        """
        outer, live = self._stage, self._console.is_terminal
        with nullcontext(outer.bar) if outer else self._new_bar() as bar:
            stage = self._stage = _Stage(name, total, done, bar, began_with=done)
            if not live:
                self.say(stage.line())
            try:
                yield
            finally:
                if not live and stage.done != stage.printed:
                    self.say(stage.line())
                if outer:
                    bar.remove_task(stage.task)
                self._stage = outer

    def _new_bar(self) -> Progress:
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        return Progress(
            BarColumn(bar_width=16),
            text,
            console=self._console,
            disable=not (self._console.is_terminal and self._progress),
        )

    def advance(self, done: int) -> None:
        """Show that so many steps of the current stage are finished."""
        stage = self._stage
        if stage is None:
            return
        stage.show(done)
        if not self._console.is_terminal and time.monotonic() - stage.printed_at >= self._line_interval:
            stage.printed, stage.printed_at = done, time.monotonic()
            self.say(stage.line())

    def say(self, text: str) -> None:
        """Print a line of plain text; without progress, only one that begins with "warning: "."""
        if self._progress or text.startswith("warning: "):
            self._console.print(plain(text), highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or the like."""
        self._console.print(renderable)


class SilentRunLogger(RunLogger):
    """RunLogger of the ranks after the first: writes and shows nothing."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, quiet=True)

    def write(self, row: Row, *, seconds: float | None = None) -> None:
        """Write nothing."""

    def truncate(self, stage: str, step: int) -> None:
        """Cut nothing."""


@dataclass
class _Stage:
    """The stage in progress; the clock is read for the display alone."""

    name: str
    total: int | None
    done: int
    bar: Progress
    began_with: int
    began: float = field(default_factory=time.monotonic)
    printed: int = -1
    printed_at: float = field(default_factory=time.monotonic)
    numbers: str = ""

    def __post_init__(self) -> None:
        self.printed = self.done
        self.task = self.bar.add_task(self.line(), total=self.total, completed=self.done)

    def show(self, done: int) -> None:
        self.done = done
        self.bar.update(self.task, completed=done, description=self.line())

    def line(self) -> str:
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        head = f"{self.name} {count}" if self.total is not None or self.done else self.name
        return printable(" · ".join(part for part in (head, self.numbers, self._time_left()) if part))

    def _time_left(self) -> str:
        fresh = self.done - self.began_with
        if self.total is None or fresh <= 0 or self.done >= self.total:
            return ""
        left = (time.monotonic() - self.began) / fresh * (self.total - self.done)
        return f"{int(left) // 60}:{int(left) % 60:02d} left"


def read_metrics(path: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`; a last line that an interruption left unfinished is no row.

    Args:
        path: of the file.
        stage: whose rows are wanted, which must hold numbers; None takes all as they are.

    Raises:
        CheckpointError: when it cannot be read, or another line is no row.
    """
    file, rows = Path(path), list[dict[str, Any]]()
    remedy = "restore it from a copy, or delete it to go on without the rows so far"
    if not os.path.lexists(file):
        return rows
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); {remedy}") from error
    for number, line in enumerate(lines, start=1):
        row = _parse_row(line)
        if row is not None and stage not in (None, row.get("stage")):
            continue
        if row is not None and (stage is None or _is_numeric(row)):
            rows.append(row)
        elif number < len(lines):  # the last one has no end
            raise CheckpointError(f"{file}, line {number}: damaged, not a row of metrics; {remedy}")
    return rows


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step", 0)) is int else None


def _is_numeric(row: Row) -> bool:
    values = [value for key, value in row.items() if key != "stage" and value is not None]
    try:
        return "step" in row and all(not isinstance(each, str) and math.isfinite(each) for each in values)
    except (TypeError, OverflowError):
        return False


def _format_metrics(row: Row, seconds: float | None) -> str:
    known = [key for key in _SHOWN_METRICS if row.get(key) is not None]
    shown = [key for key in known if row[key] or key not in _SHOWN_IF_NONZERO]
    parts = [_SHOWN_METRICS[key].format(row[key]) for key in shown]
    if seconds and row.get("reply_tokens"):
        parts.append(f"{row['reply_tokens'] / seconds:,.0f} tokens/s")
    return " · ".join(parts)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
