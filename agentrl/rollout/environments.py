"""Environments that episodes are played in, here those of this process: one call at a time or in threads.

`workers` has environments in processes of their own; `placement` chooses among them.
"""

import math
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
from agentrl.env.briefing import read_briefing
from agentrl.env.containment import (
    EscapeError,
    call_contained,
    check_size,
    close_contained,
    describe_error,
    signals,
)
from agentrl.env.contract.answers import reset_answer, step_answer
from agentrl.errors import AgentRLError, EnvironmentContractError
from agentrl.rollout.play import EnvironmentCall, Restore, Step, Stop, Transition
from agentrl.rollout.settings import WorkersConfig

TextGym = gymnasium.Env[str, str]
Make = Callable[[], TextGym]
Answered = tuple[str, Transition | Stop]


class Environments(ABC):
    """Environments that episodes are played in, each used by one episode at a time.

    `close`, called at the end of a `with` block, closes them all; new ones are made when needed again.

    Attributes:
        capacity: The number of episodes that can be played at a time; None for no limit.
        restarts: The number of workers that were lost or killed, and replaced.
        recycled: The number of workers that were replaced because of their age or memory.
    """

    capacity: int | None = None
    restarts: int = 0
    recycled: int = 0

    @abstractmethod
    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Accept a call of an episode: first a `Reset` or `Restore`, then one call at a time."""

    @abstractmethod
    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Return the answers that have come, by episode.

        Args:
            wait: Whether to wait until there is one, if any is pending.
            max_wait: The maximum time to wait, in seconds.

        Raises:
            AgentRLError: An environment cannot be made, for a reason that its user can fix.
        """

    @abstractmethod
    def release(self, episode: str, *, broken: bool = False) -> None:
        """Take back the environment of an episode; a broken one is discarded."""

    @abstractmethod
    def borrow(self) -> Any:
        """Lend an environment for the length of a `with` block, to read its tasks or to play in it."""

    def find(self, task: str) -> "tuple[Environments, str]":
        """Return the environments of a task, and its id there; only several in one have more than one."""
        return self, task

    @abstractmethod
    def close(self) -> None:
        """Close all environments."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EnvironmentPool(Environments):
    """Environments of this process, called one after another.

    Any exception in a call ends its episode, SystemExit and KeyboardInterrupt included; a signal that is sent
    to this process, as by Ctrl-C, ends the collection. A call that hangs is not stopped, and a call that ends
    the process (`os._exit`, a crash of native code, too much memory) is not survived.

    Args:
        make: The function that makes an environment; it is called when none is free.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._free: list[TextGym] = []
        self._in_use: dict[int, TextGym] = {}
        self._handles: dict[int, RemoteEnv] = {}  # one per environment, so that a borrower can recognise it
        self._env_of: dict[str, TextGym] = {}
        self._calls: list[tuple[str, EnvironmentCall]] = []

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Queue a call; it is made in `poll`."""
        self._calls.append((episode, effect))

    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Make all queued calls and return their answers."""
        calls, self._calls = self._calls, []
        with signals:
            return [(episode, self._answer(episode, effect)) for episode, effect in calls]

    def _answer(self, episode: str, effect: EnvironmentCall) -> Transition | Stop:
        if episode not in self._env_of:
            made = made_or_stop(self.take)
            if isinstance(made, Stop):
                return made
            self._env_of[episode] = made
        return transition_or_stop(self._env_of[episode], effect)

    def release(self, episode: str, *, broken: bool = False) -> None:
        """Take back the environment of an episode; a broken one is closed."""
        env = self._env_of.pop(episode, None)
        if env is not None:
            (self.discard if broken else self.give_back)(env)

    def take(self) -> TextGym:
        """Return a free environment, or a new one."""
        env = self._free.pop() if self._free else self._make()
        self._in_use[id(env)] = env
        return env

    def give_back(self, env: TextGym) -> None:
        """Make an environment free again."""
        if self._in_use.pop(id(env), None) is not None:
            self._free.append(env)

    def discard(self, env: TextGym) -> None:
        """Close an environment that is in an unknown state."""
        self._in_use.pop(id(env), None)
        self._handles.pop(id(env), None)
        close_contained(env)

    @contextmanager
    def borrow(self) -> Iterator[TextGym]:
        """Lend an environment; it is discarded if the `with` block raises."""
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
        """Close all environments, those in use included."""
        self._calls.clear()
        self._env_of.clear()
        while self._free:
            self.discard(self._free.pop())
        for env in list(self._in_use.values()):
            self.discard(env)


class ThreadedEnvironments(Environments):
    """Environments of this process with one thread each, so that their calls overlap.

    This is for environments that declare `thread_safe` and mostly wait for a server, a sandbox or a disk. A
    call that takes too long is abandoned; its thread goes on, since a thread cannot be killed.

    Args:
        make: The function that makes an environment.
        capacity: The number of threads, and of environments.
        deadlines: The time limits of calls.
    """

    def __init__(self, make: Make, capacity: int, deadlines: WorkersConfig | None = None) -> None:
        self.capacity = capacity
        self._pool = EnvironmentPool(make)
        self._deadlines = deadlines or WorkersConfig()
        self._lock = threading.Lock()
        self._answers: SimpleQueue[tuple[_EnvThread, Transition | Stop | AgentRLError]] = SimpleQueue()
        self._thread_of: dict[str, _EnvThread] = {}
        self._idle: list[_EnvThread] = []

    def submit(self, episode: str, effect: EnvironmentCall) -> None:
        """Pass a call to the thread of the episode."""
        thread = self._thread_of.get(episode)
        if thread is None:
            thread = self._idle.pop() if self._idle else self._start_thread()
            self._thread_of[episode] = thread
        thread.limit = (
            self._deadlines.step_timeout if isinstance(effect, Step) else self._deadlines.reset_timeout
        )
        thread.limit += 0 if thread.env is not None else self._deadlines.construct_timeout
        thread.call_name = type(effect).__name__.lower()
        thread.deadline = time.monotonic() + thread.limit
        thread.calls.put(effect)

    def poll(self, *, wait: bool, max_wait: float = math.inf) -> Sequence[Answered]:
        """Return the answers that have come, and a `Stop` for each call past its deadline."""
        until = time.monotonic() + max_wait
        while True:
            answers = self._ready(wait, until)
            now = time.monotonic()
            for episode, thread in list(self._thread_of.items()):
                if thread.deadline is not None and now >= thread.deadline:
                    answers.append(
                        (episode, Stop(StopReason.WORKER_ERROR, overdue(thread.call_name, thread.limit)))
                    )
                    # The late thread keeps its environment; its answer is dropped when it comes.
                    self._thread_of[episode] = self._start_thread()
                    self.restarts += 1
            idle = all(thread.deadline is None for thread in self._thread_of.values())
            if answers or not wait or idle or now >= until:
                return answers

    def _ready(self, wait: bool, until: float) -> list[Answered]:
        answers: list[Answered] = []
        deadlines = [thread.deadline for thread in self._thread_of.values() if thread.deadline is not None]
        timeout = max(0.0, min(*deadlines, until) - time.monotonic()) if wait and deadlines else 0.0
        with suppress(Empty):
            while True:
                thread, answer = self._answers.get(timeout=0 if answers else timeout)
                episode = next((name for name, held in self._thread_of.items() if held is thread), None)
                if episode is None:
                    continue  # the call was abandoned at its deadline
                thread.deadline = None
                if isinstance(answer, AgentRLError):
                    raise answer
                answers.append((episode, answer))
        return answers

    def release(self, episode: str, *, broken: bool = False) -> None:
        """Make the thread of an episode free for another one; a broken environment is closed."""
        thread = self._thread_of.pop(episode, None)
        if thread is None:
            return
        if broken and thread.env is not None:
            env, thread.env = thread.env, None
            # Closing may hang, so it gets a thread of its own.
            threading.Thread(target=self._pool.discard, args=(env,), daemon=True).start()
        self._idle.append(thread)

    def _start_thread(self) -> "_EnvThread":
        thread = _EnvThread()
        threading.Thread(target=self._work, args=(thread,), daemon=True).start()
        return thread

    def _work(self, thread: "_EnvThread") -> None:
        while (effect := thread.calls.get()) is not None:
            answer: Transition | Stop | AgentRLError
            try:
                answer = self._answer(thread, effect)
            except AgentRLError as error:
                answer = error
            except BaseException as error:
                answer = Stop(StopReason.ENV_ERROR, describe_error(error))
            self._answers.put((thread, answer))

    def _answer(self, thread: "_EnvThread", effect: EnvironmentCall) -> Transition | Stop:
        if thread.env is None:
            with self._lock:  # the pool and the constructor need not be thread-safe
                made = made_or_stop(self._pool.take)
            if isinstance(made, Stop):
                return made
            thread.env = made
        return transition_or_stop(thread.env, effect)

    def borrow(self) -> Any:
        """Lend an environment that is used in the calling thread."""
        return self._pool.borrow()

    def close(self) -> None:
        """End all threads, and close all environments."""
        for thread in [*self._thread_of.values(), *self._idle]:
            thread.calls.put(None)
        self._thread_of.clear()
        self._idle.clear()
        self._pool.close()


@dataclass(slots=True, eq=False)
class _EnvThread:
    """A thread, its queue of calls and its environment."""

    calls: SimpleQueue[EnvironmentCall | None] = field(default_factory=SimpleQueue)
    env: TextGym | None = None
    deadline: float | None = None
    limit: float = 0.0
    call_name: str = ""


def transition_or_stop(env: TextGym, effect: EnvironmentCall) -> Transition | Stop:
    """Call an environment; return an error as a `Stop`."""
    try:
        return call_contained(lambda: _transition(env, effect))
    except EnvironmentContractError as error:
        return Stop(StopReason.CONTRACT, str(error))
    except Exception as error:
        return Stop(StopReason.ENV_ERROR, describe_error(error))


def _transition(env: TextGym, effect: EnvironmentCall) -> Transition:
    if isinstance(effect, Restore):
        _unwrapped(env).restore(effect.snapshot)
        return Transition("")
    if isinstance(effect, Step):
        answer = Transition(*step_answer(env.step(effect.action)))
    else:
        observation, info = reset_answer(env.reset(seed=effect.seed, options={"task": effect.task}))
        answer = Transition(observation, info=info, briefing=read_briefing(env, info))
    check_size(answer.observation, answer.info)
    if effect.keep and not (answer.terminated or answer.truncated):
        return replace(answer, snapshot=_snapshot(_unwrapped(env)))
    return answer


def _unwrapped(env: TextGym) -> Any:
    return env.unwrapped


def _snapshot(env: Any) -> Any:
    if callable(getattr(env, "snapshot", None)) and callable(getattr(env, "restore", None)):
        with suppress(BaseException):  # without a snapshot, actions are replayed
            return env.snapshot()
    return None


def made_or_stop(take: Make) -> TextGym | Stop:
    """Make an environment; return an error as a `Stop`.

    Raises:
        AgentRLError: The environment cannot be made; another attempt would fail in the same way.
    """
    try:
        return call_contained(take)
    except AgentRLError:
        raise
    except Exception as error:
        return Stop(StopReason.ENV_ERROR, describe_error(error))


def answer_of(env: TextGym, name: str, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> Any:
    """Return an attribute of an environment, or the result of a method; see `RemoteEnv`.

    Raises:
        EnvironmentContractError: It raised an exception that would have ended this process, or its answer is
            too large.
        Exception: Any other exception that it raised.
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
    """Proxy of an environment elsewhere, whose answers must be picklable.

    Args:
        ask: A function of the name of an attribute, and the positional and keyword arguments to call it with.
            With None for the positional arguments it returns the attribute itself, or the ellipsis if that is
            callable.
    """

    def __init__(self, ask: Callable[[str, tuple[Any, ...] | None, Mapping[str, Any]], Any]) -> None:
        self._ask = ask

    @property
    def unwrapped(self) -> "RemoteEnv":
        """Return the proxy itself, which reads the attributes of the unwrapped environment."""
        return self

    def reset(self, **kwargs: Any) -> Any:
        """Reset the environment."""
        return self._ask("reset", (), kwargs)

    def step(self, action: str) -> Any:
        """Take a step in the environment."""
        return self._ask("step", (action,), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self._ask(name, None, {})
        return (lambda *args, **kwargs: self._ask(name, args, kwargs)) if value is ... else value


def overdue(call: str, limit: float) -> str:
    """Return the message for a call that exceeded its time limit, in seconds."""
    return f"{call} took longer than {limit:g} s"
