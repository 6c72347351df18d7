"""Playing an unknown environment: what the checks of the contract share. Nothing here trusts an answer."""

import inspect
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from agentrl.env.containment import call_contained, close_contained
from agentrl.env.contract.answers import RESET_PARTS, STEP_PARTS, shape_fault
from agentrl.errors import AgentRLError, MissingDependencyError
from agentrl.values import ValueFaultError, as_text_list

if TYPE_CHECKING:
    import psutil

Gym = gymnasium.Env[str, str]
Choose = Callable[[int, Any], str | None]  # (turn, last info) -> action, or None to stop

IDLE_ACTIONS = ("agentrl idles", "look", "wait", "help")
MAX_EPISODE_STEPS = 500
COMPARED_INFO = ("success", "score", "valid", "task_type", "expert", "state_key", "actions")
_UNLIKELY_SEED = 3_141_592_653
_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


class FaultError(Exception):
    """The claim does not hold."""


class SkipError(Exception):
    """The claim is not made, or there was no way to look."""


@dataclass(frozen=True)
class Walk:
    """The raw answers of one episode: `answers[0]` is the reset's, `answers[k + 1]` that to `actions[k]`."""

    task: str
    actions: tuple[str, ...]
    answers: tuple[tuple[Any, ...], ...]

    @property
    def ended(self) -> bool:
        return has_ended(self.answers[-1])

    @property
    def solved(self) -> bool:
        info = self.answers[-1][-1]
        return isinstance(info, Mapping) and bool(info.get("success"))

    @property
    def beginning(self) -> tuple[str, str]:
        """What every repetition begins with: the first observation and the type of the task."""
        observation, info = self.answers[0]
        return repr(observation), repr(info.get("task_type") if isinstance(info, Mapping) else None)

    def difference(self, again: "Walk") -> str | None:
        """Where a repetition differs at first."""
        for turn, (one, other) in enumerate(zip(self.answers, again.answers, strict=False)):
            if comparable(one) != comparable(other):
                return f"differs after {turn} actions"
        if len(self.answers) != len(again.answers):
            return f"has {len(again.actions)} steps, at first {len(self.actions)}"
        return None

    def prefix(self, turns: int) -> "Walk":
        """Its first turns."""
        return Walk(self.task, self.actions[:turns], self.answers[: turns + 1])


@dataclass
class Probe:
    """Environments, sampled tasks, and walks through them.

    Starting an environment may take seconds and hundreds of megabytes. Few are started therefore: the twins
    live through most checks, and every other one is closed with the check that it was made for.

    Args:
        make: makes an environment.
        seed: of resets and walks.
        tasks_per_split: how many tasks are sampled.
        steps: the length of a walk at most.
    """

    make: Callable[..., Gym]
    seed: int
    tasks_per_split: int
    steps: int
    blocked: str | None = None  # why no further check can look at anything
    splits: dict[str, int] = field(default_factory=dict)  # how many tasks each has
    repeats: dict[str, str | None] = field(default_factory=dict)  # check -> the first difference
    started_early: list[str] = field(default_factory=list)  # processes that run before anything was reset
    changed_generators: list[str] = field(
        default_factory=list
    )  # global random number generators that were changed
    seconds: dict[str, list[float]] = field(default_factory=dict)  # what it took to construct, reset, step
    processes_before: "set[psutil.Process]" = field(
        default_factory=lambda: running_processes()
    )  # before any was made
    _made: list[Gym] = field(default_factory=list)
    _twins: tuple[Gym, Gym] | None = None
    _tasks: list[str] | None = None
    _walks: list[Walk] | None = None
    _expert_walks: list[Walk] | None = None

    def new_env(self, **kwargs: Any) -> Gym:
        """A new environment, open until the end of the check."""
        with self._timed("construct"):
            env = call_contained(lambda: self.make(**kwargs))
        self._made.append(env)
        return env

    def twins(self) -> tuple[Gym, Gym]:
        """Two environments that stay open until a check fails; the walks were played on the first."""
        if self._twins is None:
            self._twins = self.new_env(), self.new_env()
        return self._twins

    def limited(self, max_steps: int, **kwargs: Any) -> Gym | None:
        """An environment with this step limit; None where it cannot be set."""
        env = self._with(max_steps=max_steps, **kwargs)
        # Where every episode is shorter by nature, the environment keeps its own limit.
        return env if env is not None and step_limit(env) in (max_steps, None) else None

    def _with(self, **kwargs: Any) -> Gym | None:
        parameters = inspect.signature(self.make).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_any and not kwargs.keys() <= parameters.keys():
            return None
        try:
            return self.new_env(**kwargs)
        except MissingDependencyError:
            raise
        except AgentRLError:
            return None

    def close_envs(self, *, failed: bool) -> None:
        """Close what a check made; after one that failed, the twins as well, as nothing is known of them."""
        if failed:
            self._twins = None
        kept = self._twins or ()
        for env in self._made:
            if all(env is not twin for twin in kept):
                close_contained(env)  # close() is a check of its own
        self._made = list(kept)

    def tasks(self) -> list[str]:
        """Some tasks of each split, spread over it: what is alike often stands together."""
        if self._tasks is None:
            known: Any = self.twins()[0].unwrapped
            try:
                self._tasks = [
                    task
                    for split in known.splits
                    for task in evenly_spaced(known.tasks(split), self.tasks_per_split)
                ]
            except MissingDependencyError:
                raise
            except Exception as error:
                self.blocked = f"there are no tasks to play ({type(error).__name__}: {error})"
                raise SkipError(self.blocked) from error
        return self._tasks

    def walks(self) -> list[Walk]:
        """One random walk through each sampled task, in turn on the first twin.

        What can be seen only once is noted on the way: what runs before the first reset, and whether the
        global random number generators are left alone.
        """
        if self._walks is None:
            tasks, env = self.tasks(), self.twins()[0]
            known: Any = env.unwrapped
            with suppress(Exception):  # hashes are a check of their own
                known.task_hash(tasks[0])
            self.started_early = started_since(self.processes_before)
            try:
                with _global_randomness(self.changed_generators):
                    self.new_env()
                    self._walks = [self.walk(env, task) for task in tasks]
            except Exception as error:
                self.blocked = f"no episode could be played ({error})"
                raise
        return self._walks

    def expert_walks(self) -> list[Walk] | None:
        """The expert's way through each sampled task, with time to finish; None where there is no expert."""
        if self._expert_walks is None and self.has_expert():
            env = (
                self._with(expert=True, max_steps=MAX_EPISODE_STEPS)
                or self._with(expert=True)
                or self.new_env()
            )
            self._expert_walks = [
                self.walk(env, t, expert_actions(env), MAX_EPISODE_STEPS) for t in self.tasks()
            ]
        return self._expert_walks

    def expert_or_random_walks(self) -> list[Walk]:
        """The expert's walks, if there were any: they use more of an environment than random ones."""
        walks = self.walks()
        return self._expert_walks or walks

    @property
    def proven(self) -> str | None:
        """The determinism that was seen; None where less was the same than any environment may declare."""
        if self.repeats.keys() != {"seeds", "group resets"}:
            return None
        return "instance" if any(self.repeats.values()) else "episode"

    def has_expert(self) -> bool:
        return callable(getattr(self.twins()[0].unwrapped, "expert", None))

    def walk(self, env: Gym, task: str, choose: Choose | None = None, limit: int | None = None) -> Walk:
        """Reset to a task and play: admissible actions at random, or what `choose` says."""
        with self._timed("reset"):
            begun = call_contained(lambda: env.reset(seed=self.seed, options={"task": task}))
        first = unpack("reset", begun, RESET_PARTS)
        actions, answers = self.continue_episode(
            env, first, choose or self.random_actions(task), limit or self.steps
        )
        return Walk(task, actions, (first, *answers))

    def continue_episode(
        self, env: Gym, last: tuple[Any, ...], choose: Choose, limit: int
    ) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
        """Play on after the answer `last`: to the end, to `limit`, or until `choose` stops."""
        actions: list[str] = []
        answers = [last]
        while len(actions) < limit and not has_ended(answers[-1]):
            action = choose(len(actions), answers[-1][-1])
            if action is None:
                break
            actions.append(action)
            with self._timed("step"):
                answer = call_contained(partial(env.step, action))
            answers.append(unpack("step", answer, STEP_PARTS))
        return tuple(actions), tuple(answers[1:])

    def replay(self, env: Gym, walk: Walk) -> Walk:
        """Play a walk's actions again."""
        return self.walk(env, walk.task, scripted(walk.actions), max(1, len(walk.actions)))

    def random_actions(self, task: str) -> Choose:
        """Admissible actions at random; others where none are told."""
        draw = random.Random(f"{self.seed}/{task}")

        def choose(turn: int, info: Any) -> str:
            actions = admissible(info)
            return draw.choice(actions) if actions else idle_action(turn, info)

        return choose

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = perf_counter()
        yield
        self.seconds.setdefault(what, []).append(perf_counter() - begun)


def evenly_spaced(tasks: Sequence[str], count: int) -> list[str]:
    """So many of them, the first included, at equal distances."""
    count = min(count, len(tasks))
    return [tasks[index * len(tasks) // count] for index in range(count)]


def scripted(actions: tuple[str, ...]) -> Choose:
    """A list of actions, then no more."""
    return lambda turn, info: actions[turn] if turn < len(actions) else None


def idle_action(turn: int, info: Any) -> str:
    """Something that hardly any environment ends an episode for."""
    return IDLE_ACTIONS[turn % len(IDLE_ACTIONS)]


def expert_actions(env: Gym) -> Choose:
    """The environment's own expert: what it tells in `info`, as players are told, or else when asked."""
    known: Any = env.unwrapped

    def choose(turn: int, info: Any) -> str | None:
        told = isinstance(info, Mapping) and "expert" in info
        action: str | None = info["expert"] if told else known.expert()
        return action

    return choose


def unpack(call: str, answer: Any, parts: tuple[str, ...]) -> tuple[Any, ...]:
    """The parts of an answer, or `FaultError`."""
    fault = shape_fault(answer, parts)
    if fault is not None:
        raise FaultError(f"{call} {fault}")
    return tuple(answer)


def has_ended(answer: tuple[Any, ...]) -> bool:
    """Whether the answer is a step's that ends the episode."""
    return len(answer) == len(STEP_PARTS) and bool(answer[2] or answer[3])


def admissible(info: Any) -> list[str]:
    """The admissible actions that an info tells."""
    actions = info.get("actions") if isinstance(info, Mapping) else None
    try:
        return as_text_list(actions)
    except ValueFaultError:
        return []


def step_limit(env: Gym) -> int | None:
    """The environment's step limit as far as it tells: an attribute, or an argument it was made with."""
    limit = getattr(env.unwrapped, "max_steps", None)
    if limit is None and env.spec is not None:
        limit = env.spec.kwargs.get("max_steps")
    return limit if isinstance(limit, int) else None


def oversize_fault(env: Gym, observation: str) -> str | None:
    """No longer than the observation space allows."""
    longest = getattr(getattr(env, "observation_space", None), "max_length", None)
    if isinstance(longest, int) and len(observation) > longest:
        return f"the observation has {len(observation):,} characters, observation_space allows {longest:,}"
    return None


def raise_fault(fault: str | None, walk: Walk, turn: int) -> None:
    """Raise a fault, if there is one, with its place: turn 0 is the reset."""
    if fault is not None:
        where = "reset" if turn == 0 else f"step {turn}"
        raise FaultError(f"{where} of task {walk.task!r}: {fault}")


def comparable(answer: tuple[Any, ...]) -> str:
    """What of an answer must be the same again."""
    info = answer[-1]
    kept = {key: info[key] for key in COMPARED_INFO if key in info} if isinstance(info, Mapping) else info
    return repr((answer[:-1], kept))  # as text: nan equals nan


@contextmanager
def _global_randomness(changed_generators: list[str]) -> Iterator[None]:
    """Note which global generators are used meanwhile, and leave them as they were."""
    kept = random.getstate(), np.random.get_state()
    # A state that no environment seeds by itself, or seeding it to what it is would not show.
    random.seed(_UNLIKELY_SEED)
    np.random.seed(_UNLIKELY_SEED)
    before = _global_states()
    try:
        yield
        changed_generators += [name for name, state in _global_states().items() if state != before[name]]
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _global_states() -> dict[str, object]:
    # numpy's holds an array, which has no plain ==
    return {"random": random.getstate(), "numpy.random": pickle.dumps(np.random.get_state(legacy=False))}


def running_processes() -> "set[psutil.Process]":
    """The living children of this process, and theirs."""
    import psutil

    return {child for child in psutil.Process().children(recursive=True) if _process_name(child)}


def started_since(before: "set[psutil.Process]") -> list[str]:
    """Names of the processes that were not there before and run still."""
    return sorted(filter(None, map(_process_name, running_processes() - before)))


def _process_name(process: "psutil.Process") -> str | None:
    """Its name; None for one that has ended, and for those that Python itself keeps once per process."""
    import psutil

    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        name: str = process.name()
        return None if any(part in " ".join(process.cmdline()) for part in _PYTHONS_OWN) else name
    except psutil.Error:
        return None
