"""Handling of SIGINT and SIGTERM: they stop a run between two updates, and none is lost."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_RESEND_AFTER = 0.05  # seconds until a swallowed stop is sent again
_GRACE = 2.0  # seconds during which a second signal does not interrupt the handling of the first


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped by a signal and can be resumed; the message says how."""


class Interruption:
    """Signal handler that raises KeyboardInterrupt for SIGINT and SIGTERM, but never while `shield` is open.

    Python swallows exceptions raised inside a finalizer or a callback of C code. So a signal is recorded
    before it is raised, and a swallowed one is sent again shortly after, or raised at the next safe point.
    """

    def __init__(self) -> None:
        self._shield_depth = 0
        self._requested = False
        self._raised_at = -math.inf  # time of the last KeyboardInterrupt that may still propagate

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Handle both signals inside the block; outside the main thread, do nothing."""
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
        """Hold signals back until the block has finished: a half-applied update cannot be resumed."""
        self._shield_depth += 1
        try:
            yield
        finally:
            self._shield_depth -= 1
        self.check_stop()

    def check_stop(self) -> None:
        """Stop here if a stop was requested; to be called at safe points.

        Raises:
            KeyboardInterrupt: If a stop was requested and no shield is open.
        """
        if self._requested and not self._shield_depth:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def pop_request(self) -> bool:
        """Return whether a stop was requested, and clear the request."""
        requested, self._requested = self._requested, False
        return requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._shield_depth and time.monotonic() > self._raised_at + _GRACE:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def _on_unraisable(self, what: Any) -> None:
        """Handle an exception that Python cannot propagate: the `sys.unraisablehook`."""
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
