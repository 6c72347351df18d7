"""The actor of `ray_environments`: the environments of one machine, called in batches."""

import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, cast

import cloudpickle

from agentrl.rollout.environments import Answered, TextGym
from agentrl.rollout.play import EnvironmentCall
from agentrl.rollout.settings import WorkersConfig
from agentrl.rollout.workers import EnvironmentLostError, ProcessEnvironments
from agentrl.scale.messages import replies_to_await


@dataclass(frozen=True, slots=True)
class Release:
    """Message that ends an episode: its environment is free again, or broken and not to be reused."""

    broken: bool


Message = tuple[str, EnvironmentCall | Release]  # with the id of the episode


@dataclass(frozen=True, slots=True)
class Report:
    """Result of an exchange: the answers, and the numbers of workers replaced since the actor started."""

    answers: Sequence[Answered]
    restarts: int
    recycled: int


class EnvironmentHost:
    """Actor class: the environments of one machine.

    Args:
        make: The pickled factory of environments; only the workers unpickle it.
        capacity: The number of episodes that are played at a time.
        config: The configuration of the workers.
        path: The driver's `sys.path`, so that the workers can import what exists on this machine too.
    """

    def __init__(self, make: bytes, capacity: int, config: WorkersConfig, path: Sequence[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._environments = ProcessEnvironments(_PickledMake(make), capacity, config)
        self._playing: set[str] = set()
        self._owed = 0
        self._borrowed: dict[int, tuple[ExitStack, Any]] = {}

    def call(self, request: bytes) -> bytes:
        """Call a method with arguments from `pack_call`; return its result or error for `unpack_result`."""
        name, arguments = pickle.loads(request)
        try:
            return pickle.dumps((getattr(self, name)(*arguments), None), protocol=5)
        except Exception as error:
            return pickle.dumps((None, error), protocol=5)

    def capacity(self) -> int:
        """Return the number of episodes that can be played at a time."""
        return cast(int, self._environments.capacity)

    def exchange(self, messages: Sequence[Message], target: int, max_wait: float) -> Report:
        """Process messages, and return once enough answers have come.

        Args:
            messages: The messages, in the order in which they were sent.
            target: The number of answers that is enough; see `replies_to_await`.
            max_wait: The time in seconds after which the call returns with what there is.
        """
        for episode, content in messages:
            if isinstance(content, Release):
                self._environments.release(episode, broken=content.broken)
                self._playing.discard(episode)
            else:
                self._environments.submit(episode, content)
                self._playing.add(episode)
                self._owed += 1
        wanted = replies_to_await(target, len(self._playing))
        answers: list[Answered] = []
        until = time.monotonic() + max_wait
        while self._owed and len(answers) < wanted and (left := until - time.monotonic()) > 0:
            found = self._environments.poll(wait=True, max_wait=left)
            self._owed -= len(found)
            answers += found
        return Report(answers, self._environments.restarts, self._environments.recycled)

    def borrow(self, number: int) -> None:
        """Reserve an environment under a number, see `Environments.borrow`."""
        borrowed = ExitStack()
        self._borrowed[number] = borrowed, borrowed.enter_context(self._environments.borrow())

    def ask(self, number: int, name: str, args: tuple[Any, ...] | None, kwargs: dict[str, Any]) -> Any:
        """Call a method or read an attribute of a reserved environment; see `RemoteEnv`."""
        value = getattr(self._borrowed[number][1], name)
        if args is not None:
            return value(*args, **kwargs)
        return ... if callable(value) else value

    def give_back(self, number: int, broken: bool) -> None:
        """End a reservation; a broken environment is not used again."""
        borrowed, _ = self._borrowed.pop(number)
        with suppress(EnvironmentLostError), borrowed:
            if broken:
                raise EnvironmentLostError("its borrower failed")

    def close(self) -> None:
        """End all worker processes."""
        self._environments.close()


def pack_call(name: str, arguments: tuple[Any, ...]) -> bytes:
    """Pack the request of `EnvironmentHost.call`; Ray's own pickling is slower."""
    return pickle.dumps((name, arguments), protocol=5)


def unpack_result(answer: bytes) -> Any:
    """Unpack the result of `EnvironmentHost.call`, or raise the error that it caught."""
    outcome, error = pickle.loads(answer)
    if error is not None:
        raise error
    return outcome


@dataclass(frozen=True)
class _PickledMake:
    """Factory of environments that only workers unpickle, since this process may lack its modules."""

    content: bytes

    def __call__(self) -> TextGym:
        return cast(TextGym, cloudpickle.loads(self.content)())

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (self.content,)
