"""Logger of a run: `metrics.jsonl` with one row per step, and the progress on the console."""

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
from agentrl.run.metric_keys import current_keys
from agentrl.terminal import Terminal, plain, printable

Row = Mapping[str, Any]

_TOKENS = "rollout/reply_tokens"
# Format of each metric in the progress line, in this order.
_SHOWN_METRICS = {
    "rollout/success_rate": "success {:.3f}",
    "rollout/reward_mean": "return {:.3f}",
    "learner/loss": "loss {:.3f}",
    "rollout/entropy/token": "entropy {:.3f}",
    "rollout/aborted_rate": "aborted {:.1%}",
    "rollout/stop/context_limit": "context full {:.1%}",
}
_SHOWN_IF_NONZERO = ("rollout/aborted_rate", "rollout/stop/context_limit")


class RunLogger:
    """Logger that appends to `metrics.jsonl` and shows progress.

    Progress is a live bar in a terminal, and else a plain line every few seconds.

    Args:
        folder: The run's folder.
        quiet: Whether to write the file only and show nothing. If the logger `agentrl` is set above INFO,
            warnings and results are shown without progress.
        console: The console to show progress on; standard output by default.
        seconds_between_lines: The minimum time between two plain lines of one stage.
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
        """Add the path to an OSError that lacks one, as that of a full disk does."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def write(self, row: Row, *, seconds: float | None = None) -> None:
        """Append a row and show it.

        Args:
            row: JSON values; `step` is the number of finished steps of the stage. Non-finite numbers are
                written as null.
            seconds: The time that the row's reply tokens took. It is only shown, because the file must not
                depend on the clock.

        Raises:
            OSError: If the disk is full; earlier rows stay readable.
            CheckpointError: If the file was removed since the previous row.
        """
        finite = {key: None if _is_not_finite(value) else value for key, value in row.items()}
        with self._with_path_in_errors():
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            if not os.fstat(self._file.fileno()).st_nlink:
                raise CheckpointError(
                    f"{self.path}: was removed during the run; resume the run to rewrite the rows since its "
                    "last checkpoint, or start a new one"
                )
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        if self._stage is not None:
            self._stage.numbers = _format_metrics(finite, seconds)
            self.advance(int(row.get("step", self._stage.done + 1)))

    def truncate(self, stage: str, step: int) -> None:
        """Remove the rows after `step` of `stage`, which a resumed run writes again.

        Earlier rows are kept, also those of other stages. If there is no row up to `step`, the file is cut
        where the stage begins; the stage `start` comes before all others.
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
        """Flush the rows to the disk."""
        if self._file is not None:
            with self._with_path_in_errors():
                os.fsync(self._file.fileno())

    @contextmanager
    def stage(self, name: str, total: int | None = None, done: int = 0) -> Iterator[None]:
        """Show the progress of the block; a nested stage is shown below the outer one.

        Args:
            name: The name of the stage.
            total: The number of steps of the whole stage, if known.
            done: The number of steps that were finished earlier, in a resumed run.
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
        """Show the number of finished steps of the current stage."""
        stage = self._stage
        if stage is None:
            return
        stage.show(done)
        if not self._console.is_terminal and time.monotonic() - stage.printed_at >= self._line_interval:
            stage.printed, stage.printed_at = done, time.monotonic()
            self.say(stage.line())

    def say(self, text: str) -> None:
        """Print a line of plain text; if progress is off, only a line that begins with "warning: "."""
        if self._progress or text.startswith("warning: "):
            self._console.print(plain(text), highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or another rich renderable."""
        self._console.print(renderable)


class SilentRunLogger(RunLogger):
    """Logger of all ranks but the first, which writes and shows nothing."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, quiet=True)

    def write(self, row: Row, *, seconds: float | None = None) -> None:
        """Do nothing."""

    def truncate(self, stage: str, step: int) -> None:
        """Do nothing."""


@dataclass
class _Stage:
    """Stage in progress; the clock is used for the display only."""

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
        """Update the progress bar."""
        self.done = done
        self.bar.update(self.task, completed=done, description=self.line())

    def line(self) -> str:
        """Return the progress as a line of text."""
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        head = f"{self.name} {count}" if self.total is not None or self.done else self.name
        return printable(" · ".join(part for part in (head, self.numbers, self._time_left()) if part))

    def _time_left(self) -> str:
        done_now = self.done - self.began_with
        if self.total is None or done_now <= 0 or self.done >= self.total:
            return ""
        left = (time.monotonic() - self.began) / done_now * (self.total - self.done)
        return f"{int(left) // 60}:{int(left) % 60:02d} left"


def read_metrics(path: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, without an incomplete last line that an interruption left.

    Rows that an older version wrote get the keys of today, see `metric_keys`.

    Args:
        path: The file.
        stage: The stage whose rows to return, all of whose values must be numbers; None returns all rows.

    Raises:
        CheckpointError: If the file cannot be read, or a line other than the last is not a row.
    """
    file, rows = Path(path), list[dict[str, Any]]()
    remedy = "restore it from a copy, or delete it to continue without the rows so far"
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
            rows.append(current_keys(row, str(row.get("stage"))))
        elif number < len(lines):  # the last line may be incomplete
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
    values = {key: row.get(f"{row.get('stage')}/{key}") for key in (*_SHOWN_METRICS, _TOKENS)}
    known = [key for key in _SHOWN_METRICS if values[key] is not None]
    shown = [key for key in known if values[key] or key not in _SHOWN_IF_NONZERO]
    parts = [_SHOWN_METRICS[key].format(values[key]) for key in shown]
    tokens = values[_TOKENS]
    if seconds and tokens:
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    return " · ".join(parts)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
