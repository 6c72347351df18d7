"""Play an unknown environment for the contract checks, without trusting anything that it returns."""

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
COMPARED_INFO = ("success", "score", "valid", "task_text", "task_type", "expert", "state_key", "actions")
_UNLIKELY_SEED = 3_141_592_653
_PYTHON_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


class FaultError(Exception):
    """Raised by a check if the claim does not hold."""


class SkipError(Exception):
    """Raised by a check if the environment does not make the claim, or it cannot be checked."""


@dataclass(frozen=True)
class Walk:
    """Raw answers of one episode: `answers[0]` from `reset`, `answers[k + 1]` from the step `actions[k]`."""

    task: str
    actions: tuple[str, ...]
    answers: tuple[tuple[Any, ...], ...]

    @property
    def ended(self) -> bool:
        """Return whether the episode ended."""
        return has_ended(self.answers[-1])

    @property
    def solved(self) -> bool:
        """Return whether the last info reports success."""
        info = self.answers[-1][-1]
        return isinstance(info, Mapping) and bool(info.get("success"))

    @property
    def beginning(self) -> tuple[str, str]:
        """Return the first observation and the task type, which every repetition must share."""
        observation, info = self.answers[0]
        return repr(observation), repr(info.get("task_type") if isinstance(info, Mapping) else None)

    def difference(self, again: "Walk") -> str | None:
        """Return the first difference to a repetition of the episode, or None."""
        for turn, (one, other) in enumerate(zip(self.answers, again.answers, strict=False)):
            if comparable(one) != comparable(other):
                return f"differs after {turn} actions"
        if len(self.answers) != len(again.answers):
            return f"has {len(again.actions)} steps, the first time {len(self.actions)}"
        return None

    def prefix(self, turns: int) -> "Walk":
        """Return the first turns of the episode."""
        return Walk(self.task, self.actions[:turns], self.answers[: turns + 1])


@dataclass
class Probe:
    """Shared state of the checks: environments, selected tasks, and walks (episodes) through them.

    Since starting an environment may take seconds and hundreds of megabytes, most checks share two
    environments, the twins. Every other environment is closed after the check that made it.

    Args:
        make: A function that makes an environment.
        seed: The seed of resets and random actions.
        tasks_per_split: The number of tasks to select from each split.
        steps: The maximum number of steps of a random walk.
    """

    make: Callable[..., Gym]
    seed: int
    tasks_per_split: int
    steps: int
    blocked: str | None = None  # why no further check is possible
    splits: dict[str, int] = field(default_factory=dict)  # number of tasks per split
    repeats: dict[str, str | None] = field(default_factory=dict)  # check -> the first difference
    started_early: list[str] = field(default_factory=list)  # processes running before the first reset
    changed_generators: list[str] = field(default_factory=list)  # global generators that an episode used
    seconds: dict[str, list[float]] = field(default_factory=dict)  # durations of construct, reset, step
    processes_before: "set[psutil.Process]" = field(
        default_factory=lambda: running_processes()
    )  # before any was made
    _made: list[Gym] = field(default_factory=list)
    _twins: tuple[Gym, Gym] | None = None
    _tasks: list[str] | None = None
    _walks: list[Walk] | None = None
    _expert_walks: list[Walk] | None = None

    def new_env(self, **kwargs: Any) -> Gym:
        """Make an environment that stays open until the end of the check."""
        with self._timed("construct"):
            env = call_contained(lambda: self.make(**kwargs))
        self._made.append(env)
        return env

    def twins(self) -> tuple[Gym, Gym]:
        """Return the two environments that stay open until a check fails; walks are played on the first."""
        if self._twins is None:
            self._twins = self.new_env(), self.new_env()
        return self._twins

    def limited(self, max_steps: int, **kwargs: Any) -> Gym | None:
        """Make an environment with the given step limit, or return None if it cannot be set."""
        env = self._with(max_steps=max_steps, **kwargs)
        # An environment whose episodes are always shorter keeps its own limit.
        return env if env is not None and step_limit(env) in (max_steps, None) else None

    def _with(self, **kwargs: Any) -> Gym | None:
        """Make an environment with extra arguments, or return None if it does not accept them."""
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
        """Close the environments of a check, and the twins too if it failed, as their state is unknown."""
        if failed:
            self._twins = None
        kept = self._twins or ()
        for env in self._made:
            if all(env is not twin for twin in kept):
                close_contained(env)  # another check covers close()
        self._made = list(kept)

    def tasks(self) -> list[str]:
        """Return some tasks of each split, evenly spaced, since neighbours are often alike."""
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
        """Return one random walk through each selected task, played on the first twin.

        The first call also records what can be observed only once: the processes that run before the first
        reset, and the global random number generators that an episode uses.
        """
        if self._walks is None:
            tasks, env = self.tasks(), self.twins()[0]
            known: Any = env.unwrapped
            with suppress(Exception):  # another check covers hashes
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
        """Return the expert's walk through each selected task, or None without an expert."""
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
        """Return the expert's walks if played, as they use more of the environment, else the random ones."""
        walks = self.walks()
        return self._expert_walks or walks

    @property
    def proven(self) -> str | None:
        """Return the observed determinism, or None if it is weaker than any that may be declared."""
        if self.repeats.keys() != {"seeds", "group resets"}:
            return None
        return "instance" if any(self.repeats.values()) else "episode"

    def has_expert(self) -> bool:
        """Return whether the environment has an expert."""
        return callable(getattr(self.twins()[0].unwrapped, "expert", None))

    def walk(self, env: Gym, task: str, choose: Choose | None = None, limit: int | None = None) -> Walk:
        """Play a task from the reset, with random admissible actions unless `choose` is given."""
        with self._timed("reset"):
            answer = call_contained(lambda: env.reset(seed=self.seed, options={"task": task}))
        first = unpack("reset", answer, RESET_PARTS)
        actions, answers = self.continue_episode(
            env, first, choose or self.random_actions(task), limit or self.steps
        )
        return Walk(task, actions, (first, *answers))

    def continue_episode(
        self, env: Gym, last: tuple[Any, ...], choose: Choose, limit: int
    ) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
        """Play from the answer `last` until the end, `limit` steps, or `choose` returning None."""
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
        """Play the actions of a walk again."""
        return self.walk(env, walk.task, scripted(walk.actions), max(1, len(walk.actions)))

    def random_actions(self, task: str) -> Choose:
        """Return a chooser of random admissible actions, or of idle actions if none are listed."""
        draw = random.Random(f"{self.seed}/{task}")

        def choose(turn: int, info: Any) -> str:
            actions = admissible(info)
            return draw.choice(actions) if actions else idle_action(turn, info)

        return choose

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds.setdefault(what, []).append(perf_counter() - start)


def evenly_spaced(tasks: Sequence[str], count: int) -> list[str]:
    """Return `count` evenly spaced tasks, including the first."""
    count = min(count, len(tasks))
    return [tasks[index * len(tasks) // count] for index in range(count)]


def scripted(actions: tuple[str, ...]) -> Choose:
    """Return a chooser of the given actions that stops after the last."""
    return lambda turn, info: actions[turn] if turn < len(actions) else None


def idle_action(turn: int, info: Any) -> str:
    """Return an action that hardly any environment ends an episode for."""
    return IDLE_ACTIONS[turn % len(IDLE_ACTIONS)]


def expert_actions(env: Gym) -> Choose:
    """Return a chooser of the expert's actions, from `info["expert"]` if present, else from `expert()`."""
    known: Any = env.unwrapped

    def choose(turn: int, info: Any) -> str | None:
        in_info = isinstance(info, Mapping) and "expert" in info
        action: str | None = info["expert"] if in_info else known.expert()
        return action

    return choose


def unpack(call: str, answer: Any, parts: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the parts of an answer, or raise `FaultError` if it has another shape."""
    fault = shape_fault(answer, parts)
    if fault is not None:
        raise FaultError(f"{call} {fault}")
    return tuple(answer)


def has_ended(answer: tuple[Any, ...]) -> bool:
    """Return whether an answer is from a step that ended the episode."""
    return len(answer) == len(STEP_PARTS) and bool(answer[2] or answer[3])


def admissible(info: Any) -> list[str]:
    """Return the admissible actions listed in an info."""
    actions = info.get("actions") if isinstance(info, Mapping) else None
    try:
        return as_text_list(actions)
    except ValueFaultError:
        return []


def step_limit(env: Gym) -> int | None:
    """Return the step limit from an attribute or from the arguments of `make`, or None if unknown."""
    limit = getattr(env.unwrapped, "max_steps", None)
    if limit is None and env.spec is not None:
        limit = env.spec.kwargs.get("max_steps")
    return limit if isinstance(limit, int) else None


def oversize_fault(env: Gym, observation: str) -> str | None:
    """Check that an observation is no longer than the observation space allows."""
    longest = getattr(getattr(env, "observation_space", None), "max_length", None)
    if isinstance(longest, int) and len(observation) > longest:
        return f"the observation has {len(observation):,} characters, observation_space allows {longest:,}"
    return None


def raise_fault(fault: str | None, walk: Walk, turn: int) -> None:
    """Raise a `FaultError` that names task and turn (0 is the reset), if there is a fault."""
    if fault is not None:
        where = "reset" if turn == 0 else f"step {turn}"
        raise FaultError(f"{where} of task {walk.task!r}: {fault}")


def comparable(answer: tuple[Any, ...]) -> str:
    """Return the parts of an answer that must be repeatable, as text."""
    info = answer[-1]
    kept = {key: info[key] for key in COMPARED_INFO if key in info} if isinstance(info, Mapping) else info
    return repr((answer[:-1], kept))  # as text, in which nan equals nan


@contextmanager
def _global_randomness(changed_generators: list[str]) -> Iterator[None]:
    """Record which global generators are used inside a `with` block, and restore their states."""
    kept = random.getstate(), np.random.get_state()
    # An unlikely seed, since an environment that seeds a generator to its current state would go unnoticed.
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
    # pickled, because NumPy's state contains an array, whose == is elementwise
    return {"random": random.getstate(), "numpy.random": pickle.dumps(np.random.get_state(legacy=False))}


def running_processes() -> "set[psutil.Process]":
    """Return the running descendants of this process."""
    import psutil

    return {child for child in psutil.Process().children(recursive=True) if _process_name(child)}


def started_since(before: "set[psutil.Process]") -> list[str]:
    """Return the names of running descendants that are not in `before`."""
    return sorted(filter(None, map(_process_name, running_processes() - before)))


def _process_name(process: "psutil.Process") -> str | None:
    """Return the name of a process; None if it has ended or belongs to Python's multiprocessing."""
    import psutil

    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        name: str = process.name()
        return None if any(part in " ".join(process.cmdline()) for part in _PYTHON_PROCESSES) else name
    except psutil.Error:
        return None
