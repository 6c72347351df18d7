"""Where episodes are played. Here: environments of this process, one call at a time or in threads.

`workers` has those that live in processes of their own, `placement` chooses.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Self, cast

import gymnasium

from agentrl.data.trajectory import StopReason
from agentrl.env.answers import reset_answer, step_answer
from agentrl.env.containment import (
    EscapeError,
    call_contained,
    check_size,
    close_contained,
    describe_error,
    signals,
)
from agentrl.errors import AgentRLError, EnvironmentContractError
from agentrl.rollout.play import EnvironmentCall, Restore, Step, Stop, Transition
from agentrl.rollout.settings import WorkersConfig

TextGym = gymnasium.Env[str, str]
Make = Callable[[], TextGym]
Answered = tuple[str, Transition | Stop]


class Environments(ABC):
    """Environments that episodes are played in, each used by one episode at a time.

    Closing it, as the end of a `with` block does, closes them all; it makes new ones if asked again.

    Attributes:
        capacity: how many episodes can be played at a time; None for any number.
        restarts: workers that were lost or killed, and replaced.
        recycled: workers that were replaced because of their age or memory.
    """

    capacity: int | None = None
    restarts: int = 0
    recycled: int = 0

    @abstractmethod
    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Take what an episode asks for: first a `Reset` or `Restore`, and one thing at a time."""

    @abstractmethod
    def poll(self, *, wait: bool) -> Sequence[Answered]:
        """Return the answers that are there, by episode; with `wait`, at least one if any is owed.

        Raises:
            AgentRLError: an environment could not be made, for a reason that its user can mend.
        """

    @abstractmethod
    def release(self, episode: str, *, broken: bool = False) -> None:
        """Take back what an episode played in; what is broken is not used again."""

    @abstractmethod
    def borrow(self) -> Any:
        """Give an environment for the length of a `with` block, to ask for its tasks or to play in it."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EnvironmentPool(Environments):
    """Environments of this process that take turns; `make` is called when none is free.

    Whatever a call raises ends its episode, SystemExit and KeyboardInterrupt included; a signal that is sent
    to this process, as by Ctrl-C, ends the collection. Nothing here can stop a call that hangs, or survive
    one that takes the process down (`os._exit`, a crash of native code, too much memory).
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._free: list[TextGym] = []
        self._lent: dict[int, TextGym] = {}
        self._handles: dict[int, RemoteEnv] = {}  # by which the same environment is always borrowed
        self._playing: dict[str, TextGym] = {}
        self._asked: list[tuple[str, EnvironmentCall]] = []

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        self._asked.append((episode, effect))

    def poll(self, *, wait: bool) -> Sequence[Answered]:
        asked, self._asked = self._asked, []
        with signals:
            return [(episode, self._answer(episode, effect)) for episode, effect in asked]

    def _answer(self, episode: str, effect: EnvironmentCall) -> Transition | Stop:
        if episode not in self._playing:
            made = made_or_stop(self.take)
            if isinstance(made, Stop):
                return made
            self._playing[episode] = made
        return transition_or_stop(self._playing[episode], effect)

    def release(self, episode: str, *, broken: bool = False) -> None:
        env = self._playing.pop(episode, None)
        if env is not None:
            (self.discard if broken else self.give_back)(env)

    def take(self) -> TextGym:
        env = self._free.pop() if self._free else self._make()
        self._lent[id(env)] = env
        return env

    def give_back(self, env: TextGym) -> None:
        if self._lent.pop(id(env), None) is not None:
            self._free.append(env)

    def discard(self, env: TextGym) -> None:
        """Close an environment that cannot be trusted any more."""
        self._lent.pop(id(env), None)
        self._handles.pop(id(env), None)
        close_contained(env)

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        with signals:
            try:
                env = call_contained(self.take)
            except EscapeError as error:
                raise EnvironmentContractError(f"the environment's constructor raised {error}") from error
            try:
                yield cast(
                    TextGym,
                    self._handles.setdefault(id(env), RemoteEnv(lambda *asked: answer_of(env, *asked))),
                )
            except BaseException:
                self.discard(env)
                raise
            self.give_back(env)

    def close(self) -> None:
        self._asked.clear()
        self._playing.clear()
        while self._free:
            self.discard(self._free.pop())
        for env in list(self._lent.values()):
            self.discard(env)


class ThreadedEnvironments(Environments):
    """Environments of this process that wait at the same time, one thread for each.

    For those that declare `thread_safe` and mostly wait: for a server, a sandbox, a disk. A call that takes
    too long is given up; its thread is left to itself, as no thread can be killed.

    Args:
        make: makes an environment.
        capacity: threads, and so environments.
        deadlines: of calls, in seconds.
    """

    def __init__(self, make: Make, capacity: int, deadlines: WorkersConfig | None = None) -> None:
        self.capacity = capacity
        self._pool = EnvironmentPool(make)
        self._deadlines = deadlines or WorkersConfig()
        self._lock = threading.Lock()
        self._answers: SimpleQueue[tuple[_Seat, Transition | Stop | AgentRLError]] = SimpleQueue()
        self._seats: dict[str, _Seat] = {}
        self._idle: list[_Seat] = []

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        seat = self._seats.get(episode)
        if seat is None:
            seat = self._idle.pop() if self._idle else self._new_seat()
            self._seats[episode] = seat
        seat.limit = (
            self._deadlines.step_timeout if isinstance(effect, Step) else self._deadlines.reset_timeout
        )
        seat.limit += 0 if seat.env is not None else self._deadlines.construct_timeout
        seat.what = type(effect).__name__.lower()
        seat.deadline = time.monotonic() + seat.limit
        seat.asked.put(effect)

    def poll(self, *, wait: bool) -> Sequence[Answered]:
        while True:
            answers = self._ready(wait)
            now = time.monotonic()
            for episode, seat in list(self._seats.items()):
                if seat.deadline is not None and now >= seat.deadline:
                    answers.append((episode, Stop(StopReason.WORKER_ERROR, overdue(seat.what, seat.limit))))
                    self._seats[episode] = self._new_seat()
                    self.restarts += 1
            if answers or not wait or all(seat.deadline is None for seat in self._seats.values()):
                return answers

    def _ready(self, wait: bool) -> list[Answered]:
        answers: list[Answered] = []
        owed = [seat.deadline for seat in self._seats.values() if seat.deadline is not None]
        patience = max(0.0, min(owed) - time.monotonic()) if wait and owed else 0.0
        with suppress(Empty):
            while True:
                seat, answer = self._answers.get(timeout=0 if answers else patience)
                episode = next((name for name, held in self._seats.items() if held is seat), None)
                if episode is None:
                    continue  # it came after its deadline
                seat.deadline = None
                if isinstance(answer, AgentRLError):
                    raise answer
                answers.append((episode, answer))
        return answers

    def release(self, episode: str, *, broken: bool = False) -> None:
        seat = self._seats.pop(episode, None)
        if seat is None:
            return
        if broken and seat.env is not None:
            env, seat.env = seat.env, None
            threading.Thread(target=self._pool.discard, args=(env,), daemon=True).start()
        self._idle.append(seat)

    def _new_seat(self) -> "_Seat":
        seat = _Seat()
        threading.Thread(target=self._work, args=(seat,), daemon=True).start()
        return seat

    def _work(self, seat: "_Seat") -> None:
        while (effect := seat.asked.get()) is not None:
            answer: Transition | Stop | AgentRLError
            try:
                answer = self._answer(seat, effect)
            except AgentRLError as error:
                answer = error
            except BaseException as error:
                answer = Stop(StopReason.ENV_ERROR, describe_error(error))
            self._answers.put((seat, answer))

    def _answer(self, seat: "_Seat", effect: EnvironmentCall) -> Transition | Stop:
        if seat.env is None:
            with self._lock:
                made = made_or_stop(self._pool.take)
            if isinstance(made, Stop):
                return made
            seat.env = made
        return transition_or_stop(seat.env, effect)

    def borrow(self) -> Any:
        return self._pool.borrow()

    def close(self) -> None:
        for seat in [*self._seats.values(), *self._idle]:
            seat.asked.put(None)
        self._seats.clear()
        self._idle.clear()
        self._pool.close()


@dataclass(slots=True, eq=False)
class _Seat:
    """A thread's place and the environment it looks after."""

    asked: SimpleQueue[EnvironmentCall | None] = field(default_factory=SimpleQueue)
    env: TextGym | None = None
    deadline: float | None = None
    limit: float = 0.0
    what: str = ""


def transition_or_stop(env: TextGym, effect: EnvironmentCall) -> Transition | Stop:
    """Ask an environment; what it does wrong is a value."""
    try:
        return call_contained(lambda: _transition(env, effect))
    except EnvironmentContractError as error:
        return Stop(StopReason.CONTRACT, str(error))
    except Exception as error:
        return Stop(StopReason.ENV_ERROR, describe_error(error))


def _transition(env: TextGym, effect: EnvironmentCall) -> Transition:
    if isinstance(effect, Restore):
        _beneath(env).restore(effect.snapshot)
        return Transition("")
    if isinstance(effect, Step):
        answer = Transition(*step_answer(env.step(effect.action)))
    else:
        observation, info = reset_answer(env.reset(seed=effect.seed, options={"task": effect.task}))
        answer = Transition(observation, info=info)
    check_size(answer.observation, answer.info)
    if effect.keep and not (answer.terminated or answer.truncated):
        return replace(answer, snapshot=_snapshot(_beneath(env)))
    return answer


def _beneath(env: TextGym) -> Any:
    return env.unwrapped


def _snapshot(known: Any) -> Any:
    if callable(getattr(known, "snapshot", None)) and callable(getattr(known, "restore", None)):
        with suppress(BaseException):  # the episode can do without
            return known.snapshot()
    return None


def made_or_stop(take: Make) -> TextGym | Stop:
    """Make an environment. An `AgentRLError` passes: every other attempt would say the same."""
    try:
        return call_contained(take)
    except AgentRLError:
        raise
    except Exception as error:
        return Stop(StopReason.ENV_ERROR, describe_error(error))


def answer_of(env: TextGym, name: str, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> Any:
    """Ask an environment for an attribute, or call it; see `RemoteEnv`.

    Raises:
        EnvironmentContractError: it raised what would have ended this process, or answered too much.
        Exception: whatever else it raised.
    """
    try:
        return call_contained(lambda: _answer_of(env, name, args, kwargs))
    except EscapeError as error:
        raise EnvironmentContractError(f"the environment's {name} raised {error}") from error


def _answer_of(env: TextGym, name: str, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> Any:
    value = getattr(env if name in ("reset", "step") else env.unwrapped, name)
    if args is None:
        return ... if callable(value) else value
    value = value(*args, **kwargs)
    if name in ("reset", "step") and isinstance(value, tuple) and value:
        check_size(value[0], value[-1])
    return value


class RemoteEnv:
    """An environment somewhere else, as if it were here; what it answers has to be picklable.

    Args:
        ask: is given the name of an attribute, and the arguments to call it with. Without arguments, None,
            it returns what the attribute is, and the ellipsis for one that can be called.
    """

    def __init__(self, ask: Callable[[str, tuple[Any, ...] | None, Mapping[str, Any]], Any]) -> None:
        self._ask = ask

    @property
    def unwrapped(self) -> "RemoteEnv":
        return self

    def reset(self, **kwargs: Any) -> Any:
        return self._ask("reset", (), kwargs)

    def step(self, action: str) -> Any:
        return self._ask("step", (action,), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self._ask(name, None, {})
        return (lambda *args, **kwargs: self._ask(name, args, kwargs)) if value is ... else value


def overdue(what: str, limit: float) -> str:
    """What is said of a call that did not end in time."""
    return f"{what} took longer than {limit:g} s"
