"""Playing an unknown environment: what the checks of the contract share. Nothing here trusts an answer."""

import inspect
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import gymnasium

from agentrl.env.answers import RESET_PARTS, STEP_PARTS, shape_fault
from agentrl.errors import AgentRLError

Gym = gymnasium.Env[str, str]
Choose = Callable[[int, Any], str | None]  # (turn, last info) -> action, or None to stop

IDLE_ACTIONS = ("agentrl idles", "look", "wait", "help")
LONGEST_EPISODE = 500
COMPARED_INFO = ("success", "score", "valid", "task_type", "expert", "state_key", "actions")


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


@dataclass
class Probe:
    """Environments, sampled tasks, and random walks through them.

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
    repeatable: bool = False  # whether whole episodes were the same on new environments
    _made: list[Gym] = field(default_factory=list)
    _tasks: list[str] | None = None
    _walks: list[Walk] | None = None

    def fresh(self, **kwargs: Any) -> Gym:
        env = self.make(**kwargs)
        self._made.append(env)
        return env

    def limited(self, max_steps: int) -> Gym | None:
        """An environment with this step limit; None where it cannot be set."""
        env = self._with("max_steps", max_steps)
        # Where every episode is shorter by nature, the environment keeps its own limit.
        return env if env is not None and step_limit(env) in (max_steps, None) else None

    def with_expert(self) -> Gym | None:
        """An environment that can tell what its expert would do; None where there is no expert."""
        if not callable(getattr(self.fresh().unwrapped, "expert", None)):
            return None
        return self._with("expert", True) or self.fresh()

    def _with(self, argument: str, value: Any) -> Gym | None:
        parameters = inspect.signature(self.make).parameters.values()
        if not any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        try:
            return self.fresh(**{argument: value})
        except AgentRLError:
            return None

    def close(self) -> None:
        for env in self._made:
            with suppress(Exception):  # close() is a check of its own
                env.close()

    def tasks(self) -> list[str]:
        """The first tasks of each split."""
        if self._tasks is None:
            known: Any = self.fresh().unwrapped
            try:
                self._tasks = [
                    t for split in known.splits for t in islice(known.tasks(split), self.tasks_per_split)
                ]
            except Exception as error:
                self.blocked = f"there are no tasks to play ({type(error).__name__}: {error})"
                raise SkipError(self.blocked) from error
        return self._tasks

    def walks(self) -> list[Walk]:
        """One random walk through each sampled task, each on a new environment."""
        if self._walks is None:
            tasks = self.tasks()
            try:
                self._walks = [self.walk(self.fresh(), task) for task in tasks]
            except Exception as error:
                self.blocked = f"no episode could be played ({error})"
                raise
        return self._walks

    def walk(self, env: Gym, task: str, choose: Choose | None = None, limit: int | None = None) -> Walk:
        """Reset to a task and play: admissible actions at random, or what `choose` says."""
        first = unpack("reset", env.reset(seed=self.seed, options={"task": task}), RESET_PARTS)
        actions, answers = self.go_on(env, first, choose or self.wander(task), limit or self.steps)
        return Walk(task, actions, (first, *answers))

    def go_on(
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
            answers.append(unpack("step", env.step(action), STEP_PARTS))
        return tuple(actions), tuple(answers[1:])

    def replay(self, env: Gym, walk: Walk) -> Walk:
        """Play a walk's actions again."""
        return self.walk(env, walk.task, follow(walk.actions), max(1, len(walk.actions)))

    def wander(self, task: str) -> Choose:
        """Admissible actions at random; others where none are told."""
        draw = random.Random(f"{self.seed}/{task}")

        def choose(turn: int, info: Any) -> str:
            actions = admissible(info)
            return draw.choice(actions) if actions else idle(turn, info)

        return choose


def follow(actions: tuple[str, ...]) -> Choose:
    """A list of actions, then no more."""
    return lambda turn, info: actions[turn] if turn < len(actions) else None


def idle(turn: int, info: Any) -> str:
    """Something that hardly any environment ends an episode for."""
    return IDLE_ACTIONS[turn % len(IDLE_ACTIONS)]


def expert_of(env: Gym) -> Choose:
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
    return (
        [action for action in actions if isinstance(action, str)] if isinstance(actions, list | tuple) else []
    )


def step_limit(env: Gym) -> int | None:
    """The environment's step limit as far as it tells: an attribute, or an argument it was made with."""
    limit = getattr(env.unwrapped, "max_steps", None)
    if limit is None and env.spec is not None:
        limit = env.spec.kwargs.get("max_steps")
    return limit if isinstance(limit, int) else None


def blame(fault: str | None, walk: Walk, turn: int) -> None:
    """Raise a fault, if there is one, with its place: turn 0 is the reset."""
    if fault is not None:
        where = "reset" if turn == 0 else f"step {turn}"
        raise FaultError(f"{where} of task {walk.task!r}: {fault}")


def comparable(answer: tuple[Any, ...]) -> str:
    """What of an answer must be the same again."""
    info = answer[-1]
    kept = {key: info[key] for key in COMPARED_INFO if key in info} if isinstance(info, Mapping) else info
    return repr((answer[:-1], kept))  # as text: nan equals nan
