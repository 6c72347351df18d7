"""Ctrl-C and SIGTERM end a run between two updates, never inside one, and are never lost."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN = 0.05  # seconds until a stop that Python swallowed is told again
_ON_ITS_WAY = 2.0  # seconds in which a second signal does not disturb what the first has raised


class RunInterrupted(KeyboardInterrupt):
    """The run was asked to stop and can be resumed; the message says how."""


class Interruption:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, held back while `shield` is open.

    A signal is recorded before it is raised: Python swallows what is raised inside a finalizer or a callback
    of C code. Such a stop is told again a moment later, and at the next safe point at the latest.
    """

    def __init__(self) -> None:
        self._shields = 0
        self._asked = False
        self._raised = -math.inf  # when, for as long as it may be on its way up

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Handle both signals; only a program's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        self._hook = hook
        try:
            yield self
            self.heed()
        finally:
            sys.unraisablehook = hook
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
        self.heed()

    def heed(self) -> None:
        """Stop here if a stop was asked for, and nothing has come of it yet: a safe point."""
        if self._asked and not self._shields:
            self._raised = time.monotonic()
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """Whether a stop was asked for; it is told once."""
        asked, self._asked = self._asked, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._shields and time.monotonic() > self._raised + _ON_ITS_WAY:
            self._raised = time.monotonic()
            raise KeyboardInterrupt

    def _swallowed(self, what: Any) -> None:
        """Python's hook for exceptions that it cannot pass on."""
        if not (self._asked and issubclass(what.exc_type, KeyboardInterrupt)):
            self._hook(what)
            return
        self._raised = -math.inf
        timer = threading.Timer(_AGAIN, self._tell_again)
        timer.daemon = True
        timer.start()

    def _tell_again(self) -> None:
        if self._asked and signal.getsignal(signal.SIGINT) == self._handle:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
