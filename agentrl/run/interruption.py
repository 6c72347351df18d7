"""Ctrl-C and SIGTERM end a run between two updates, never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunInterrupted(KeyboardInterrupt):
    """The run was asked to stop and can be resumed; the message says how."""


class Interruption:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, held back while `shield` is open."""

    def __init__(self) -> None:
        self._shields = 0
        self._pending = False

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Handle both signals; only a program's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Finish what is inside first: a half-applied update cannot be resumed."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if not self._shields and self.asked():
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """Whether a stop was asked for behind the shield; it is told once."""
        asked, self._pending = self._pending, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shields:
            self._pending = True
        else:
            raise KeyboardInterrupt
