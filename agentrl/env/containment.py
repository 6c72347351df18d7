"""Call environments so that their failures do not end or corrupt the calling process.

An environment may raise exceptions that are meant to end a program (SystemExit, KeyboardInterrupt, ...), fork
and return twice, or return hundreds of megabytes. None of this must affect the caller. A signal sent to this
process, such as Ctrl-C, must still reach it, even if an environment catches the exception.
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

MAX_ANSWER_BYTES = 16 << 20  # of an observation with its info
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")
_PLAIN = (str, int, float, bool, type(None))

T = TypeVar("T")
Env = TypeVar("Env", bound=gymnasium.Env[str, str])


class EscapeError(Exception):
    """An environment raised an exception that is not an `Exception`; the message describes it."""


def call_contained(call: Callable[[], T]) -> T:
    """Call a function of an environment and return its result.

    If the environment forks this process and returns in the child, the child exits here.

    Raises:
        EscapeError: The function raised an exception that is not an `Exception`.
        BaseException: Any other exception of the function, or the exception of a signal handler during the
            call.
    """
    process = os.getpid()
    signals.clear()
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
    """Close an environment and ignore every error."""
    try:
        with signals:
            call_contained(env.close)
    except Exception:
        return


@contextmanager
def open_env(make: Callable[[], Env]) -> Iterator[Env]:
    """Make an environment, yield it for questions about its tasks, and close it.

    Raises:
        EnvironmentContractError: The environment raised an exception that would have ended this process.
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
    """Return the type and message of an exception, as text that can be stored."""
    return str(error) if isinstance(error, EscapeError) else values.describe_error(error)


def check_size(observation: str, info: Mapping[str, Any]) -> None:
    """Refuse an observation and info that are too large to be stored or sent.

    Raises:
        EnvironmentContractError: They are; the message gives a lower bound of the size.
    """
    size = sys.getsizeof(observation) + _size(info, MAX_ANSWER_BYTES)
    if size > MAX_ANSWER_BYTES:
        raise too_large(size)


def too_large(size: int) -> EnvironmentContractError:
    """Return the error for an observation and info of `size` bytes."""
    return EnvironmentContractError(
        f"the observation and info of one call take {size / 2**20:.0f} MB, wanted at most "
        f"{MAX_ANSWER_BYTES >> 20} MB"
    )


def _size(value: object, enough: int) -> int:
    """Return the bytes of a value and its contents, stopping once the sum exceeds `enough`."""
    total, seen, left = 0, set[int](), [value]
    while left and total <= enough:
        each = left.pop()
        if type(each) in _PLAIN:
            total += sys.getsizeof(each)
            continue
        try:
            total += max(sys.getsizeof(each, 0), int(getattr(each, "nbytes", 0)))
        except (TypeError, ValueError):  # from an object of a class of the environment
            continue
        if isinstance(each, Mapping | list | tuple | set | frozenset) and id(each) not in seen:
            seen.add(id(each))
            left += [*each.keys(), *each.values()] if isinstance(each, Mapping) else each
    return total


def _end_copy(process: int) -> None:
    """Exit if this is a child that the environment forked."""
    if os.getpid() != process:
        os._exit(0)


class _Signals:
    """Record of exceptions that signal handlers raise while an environment is called.

    Inside a `with` block of the main thread, the only thread that runs signal handlers, the existing handlers
    are wrapped to record what they raise.
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
                    if signal.getsignal(number) == self._handle:  # an environment may have installed its own
                        signal.signal(number, handler)

    def clear(self) -> None:
        """Discard the recorded exception."""
        if _in_main_thread():
            self._raised = None

    def raise_again(self) -> None:
        """Raise the recorded exception of a signal handler, if there is one."""
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
