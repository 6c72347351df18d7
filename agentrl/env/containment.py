"""Keep what an environment does wrong to its call: the process that called it goes on.

An environment may raise what is meant to end a program (SystemExit, KeyboardInterrupt, ...), fork and come
back twice, or answer with hundreds of megabytes. None of that may pass for something that its caller did; a
signal that somebody sends to this process, as Ctrl-C does, must, even where an environment catches it.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self, TypeVar

import gymnasium

from agentrl import values
from agentrl.errors import EnvironmentContractError

MAX_ANSWER_BYTES = 16 << 20  # bytes of an observation with its info
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")
_PLAIN = (str, int, float, bool, type(None))

T = TypeVar("T")
Env = TypeVar("Env", bound=gymnasium.Env[str, str])


class EscapeError(Exception):
    """An environment raised what no `except Exception` stops; the message is what it was."""


def call_contained(call: Callable[[], T]) -> T:
    """Call an environment.

    In a copy of this process that the environment forked and let come back, nothing goes on.

    Raises:
        EscapeError: it raised an exception that is not an `Exception`.
        BaseException: what it raised otherwise, or the handler of a signal did meanwhile.
    """
    process = os.getpid()
    signals.forget()
    try:
        answer = call()
    except BaseException as error:
        _end_copy(process)
        signals.raise_again()
        if isinstance(error, Exception):
            raise
        raise EscapeError(describe_error(error)) from error
    _end_copy(process)
    signals.raise_again()
    return answer


def close_contained(env: Any) -> None:
    """Close an environment that nobody needs any more, whatever that raises."""
    try:
        with signals:
            call_contained(env.close)
    except Exception:
        return


@contextmanager
def open_env(make: Callable[[], Env]) -> Iterator[Env]:
    """Make an environment of this process, to be asked about its tasks in a `with` block, and close it.

    Raises:
        EnvironmentContractError: it raised what would have ended this process.
    """
    env: Env | None = None
    with signals:
        try:
            env = call_contained(make)
            yield env
        except (EscapeError, SystemExit) as error:
            where = "constructor" if env is None else "unwrapped"
            raise EnvironmentContractError(
                f"the environment's {where} raised {describe_error(error)}"
            ) from error
        finally:
            if env is not None:
                close_contained(env)


def describe_error(error: BaseException) -> str:
    """Return the kind of an exception and what it says, bounded and writable."""
    return str(error) if isinstance(error, EscapeError) else values.describe_error(error)


def check_size(observation: str, info: Mapping[str, Any]) -> None:
    """Refuse an answer that is too large to be kept or sent.

    Raises:
        EnvironmentContractError: saying how large it is, or at least is.
    """
    size = sys.getsizeof(observation) + _size(info, MAX_ANSWER_BYTES)
    if size > MAX_ANSWER_BYTES:
        raise too_large(size)


def too_large(size: int) -> EnvironmentContractError:
    """Build the error for an answer of so many bytes."""
    return EnvironmentContractError(
        f"the observation and info of one call take {size / 2**20:.0f} MB, wanted at most "
        f"{MAX_ANSWER_BYTES >> 20} MB"
    )


def _size(value: object, enough: int) -> int:
    """Bytes that a value takes with what it holds; where that is more than `enough`, how much was found."""
    total, seen, left = 0, set[int](), [value]
    while left and total <= enough:
        each = left.pop()
        if type(each) in _PLAIN:
            total += sys.getsizeof(each)
            continue
        try:
            total += max(sys.getsizeof(each, 0), int(getattr(each, "nbytes", 0)))
        except (TypeError, ValueError):  # of an object of the environment's own
            continue
        if isinstance(each, Mapping | list | tuple | set | frozenset) and id(each) not in seen:
            seen.add(id(each))
            left += [*each.keys(), *each.values()] if isinstance(each, Mapping) else each
    return total


def _end_copy(process: int) -> None:
    if os.getpid() != process:
        os._exit(0)


class _Signals:
    """Knows whether the handler of a signal raised while an environment was called.

    Within a `with` block of the main thread, which alone is interrupted by signals, the handlers that were
    there are called through this one.
    """

    def __init__(self) -> None:
        self._raised: BaseException | None = None
        self._depth = 0
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Self:
        if _in_main_thread():
            self._depth += 1
            if self._depth == 1:
                for number in (getattr(signal, name) for name in _STOPPING if hasattr(signal, name)):
                    handler = signal.getsignal(number)
                    if callable(handler) and handler != self._handle:
                        self._handlers[number] = handler
                        signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if _in_main_thread():
            self._depth -= 1
            if self._depth == 0:
                for number, handler in self._handlers.items():
                    if signal.getsignal(number) == self._handle:  # else an environment has put its own there
                        signal.signal(number, handler)

    def forget(self) -> None:
        """Begin anew."""
        if _in_main_thread():
            self._raised = None

    def raise_again(self) -> None:
        """Raise what a handler raised, if one did since it was last forgotten."""
        if self._raised is not None and _in_main_thread():
            raised, self._raised = self._raised, None
            raise raised

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            self._raised = error
            raise


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


signals = _Signals()
