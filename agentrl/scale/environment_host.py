"""The environments of one machine, asked in batches: what an actor of `ray_environments` runs."""

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
    """An episode's environment is free again, or is not to be used again."""

    broken: bool


Message = tuple[str, EnvironmentCall | Release]  # of an episode


@dataclass(frozen=True, slots=True)
class Report:
    """What an actor has to say after an exchange; workers are counted since it began."""

    answers: Sequence[Answered]
    restarts: int
    recycled: int


class EnvironmentHost:
    """What an actor runs: the environments of one machine.

    Args:
        make: makes an environment, pickled; only the workers open it.
        capacity: episodes at a time.
        config: of the workers.
        path: of the driver's imports; what of it this machine has, its workers can import as well.
    """

    def __init__(self, make: bytes, capacity: int, config: WorkersConfig, path: Sequence[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._environments = ProcessEnvironments(_PickledMake(make), capacity, config)
        self._playing: set[str] = set()
        self._owed = 0
        self._borrowed: dict[int, tuple[ExitStack, Any]] = {}

    def call(self, request: bytes) -> bytes:
        """Do what is asked; what it raises is an answer as well."""
        name, arguments = pickle.loads(request)
        try:
            return pickle.dumps((getattr(self, name)(*arguments), None), protocol=5)
        except Exception as error:
            return pickle.dumps((None, error), protocol=5)

    def capacity(self) -> int:
        """How many episodes there is room for."""
        return cast(int, self._environments.capacity)

    def exchange(self, messages: Sequence[Message], target: int, max_wait: float) -> Report:
        """Take messages, and return once some of the answers that are owed make it worth while.

        Args:
            messages: in the order they were sent.
            target: so many answers are enough; so are all, or those of three episodes in four.
            max_wait: seconds after which it returns with what there is.
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
        """Set an environment aside under a number."""
        borrowed = ExitStack()
        self._borrowed[number] = borrowed, borrowed.enter_context(self._environments.borrow())

    def ask(self, number: int, name: str, args: tuple[Any, ...] | None, kwargs: dict[str, Any]) -> Any:
        """Ask one that was set aside; see `RemoteEnv`."""
        value = getattr(self._borrowed[number][1], name)
        if args is not None:
            return value(*args, **kwargs)
        return ... if callable(value) else value

    def give_back(self, number: int, broken: bool) -> None:
        """Take back one that was set aside."""
        borrowed, _ = self._borrowed.pop(number)
        with suppress(EnvironmentLostError), borrowed:
            if broken:
                raise EnvironmentLostError("whoever borrowed it failed")

    def close(self) -> None:
        """End every process."""
        self._environments.close()


def pack_call(name: str, arguments: tuple[Any, ...]) -> bytes:
    """What `EnvironmentHost.call` is given: pickled here, since Ray is slower at it."""
    return pickle.dumps((name, arguments), protocol=5)


def unpack_result(answer: bytes) -> Any:
    """What `EnvironmentHost.call` answered, or was raised in it."""
    outcome, error = pickle.loads(answer)
    if error is not None:
        raise error
    return outcome


@dataclass(frozen=True)
class _PickledMake:
    """Makes environments, and travels without being opened: what is in it may be absent here."""

    content: bytes

    def __call__(self) -> TextGym:
        return cast(TextGym, cloudpickle.loads(self.content)())

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (self.content,)
