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

_RESEND_AFTER = 0.05  # seconds until a stop that Python swallowed is told again
_GRACE = 2.0  # seconds in which a second signal does not disturb what the first has raised


class RunInterrupted(KeyboardInterrupt):
    """The run was asked to stop and can be resumed; the message says how."""


class Interruption:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, held back while `shield` is open.

    A signal is recorded before it is raised: Python swallows what is raised inside a finalizer or a callback
    of C code. Such a stop is told again a moment later, and at the next safe point at the latest.
    """

    def __init__(self) -> None:
        self._shield_depth = 0
        self._requested = False
        self._raised_at = -math.inf  # when, for as long as it may be on its way up

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Handle both signals; only a program's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        self._outer_hook = hook
        try:
            yield self
            self.check_stop()
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Finish what is inside first: a half-applied update cannot be resumed."""
        self._shield_depth += 1
        try:
            yield
        finally:
            self._shield_depth -= 1
        self.check_stop()

    def check_stop(self) -> None:
        """Stop here if a stop was asked for, and nothing has come of it yet: a safe point."""
        if self._requested and not self._shield_depth:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def pop_request(self) -> bool:
        """Whether a stop was asked for; it is told once."""
        requested, self._requested = self._requested, False
        return requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._shield_depth and time.monotonic() > self._raised_at + _GRACE:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def _on_unraisable(self, what: Any) -> None:
        """Python's hook for exceptions that it cannot pass on."""
        if not (self._requested and issubclass(what.exc_type, KeyboardInterrupt)):
            self._outer_hook(what)
            return
        self._raised_at = -math.inf
        timer = threading.Timer(_RESEND_AFTER, self._send_again)
        timer.daemon = True
        timer.start()

    def _send_again(self) -> None:
        if self._requested and signal.getsignal(signal.SIGINT) == self._handle:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
