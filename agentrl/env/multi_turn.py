"""Base class for multi-turn environments: authors define how a task begins and what an action does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env.names import unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl.env.problems import TaskIds, content_hash, find_problem
from agentrl.env.spaces import TextSpace
from agentrl.errors import ConfigError

_OUTSIDE_EPISODES = ("spec", "_problems")  # never part of a snapshot


class MultiTurnEnv(gymnasium.Env[str, str], ABC):
    """Base class of a text environment that implements the contract of `TextEnv`.

    Subclasses implement `problems(split)`, `start(problem)` and `act(action)`. They may define `actions()`,
    `info()` and `expert()`, and the class attributes `splits`, `max_steps`, `data` and `thread_safe`. Keep
    the state of an episode in attributes of `self`, and draw random numbers from `self.np_random`.

    >>> class Echo(MultiTurnEnv):
    ...     def problems(self, split):
    ...         return ["ping", "pong"] if split == "train" else ["peng"]
    ...     def start(self, problem):
    ...         self.word = problem
    ...         return f"say {problem}"
    ...     def act(self, action):
    ...         return ("thanks", 1.0, True) if action == self.word else ("no", 0.0, False)
    >>> env = Echo(max_steps=3)
    >>> env.reset(options={"task": "train/1"})
    ('say pong', {'success': False})
    >>> env.step("pong")
    ('thanks', 1.0, True, False, {'success': True})

    Args:
        split: The split that `reset` draws a task from if none is given; None takes the first split.
        max_steps: The number of steps after which an episode is truncated; None takes that of the class.
        expert: Whether to put the next action of the expert into `info["expert"]`.

    Attributes:
        task: The id of the current task.
        steps: The number of steps taken in this episode.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    determinism: ClassVar[str] = "episode"
    observation_space = action_space = TextSpace()
    max_steps: int = 20

    def __init__(self, split: str | None = None, max_steps: int | None = None, expert: bool = False) -> None:
        if split is not None and split not in self.splits:
            raise unknown("split", split, self.splits)
        limit = whole_number("max_steps", self.max_steps if max_steps is None else max_steps, 1, MAX_STEPS)
        if expert and not callable(getattr(self, "expert", None)):
            raise ConfigError(f"expert: {type(self).__name__} has no method expert()")
        self.split = self.splits[0] if split is None else split
        self.max_steps = limit
        self.task: str | None = None
        self.steps = 0
        self._tells_expert = expert
        self._running = self._solved = False
        self._problems: dict[str, Sequence[Any]] = {}

    @abstractmethod
    def problems(self, split: str) -> Sequence[Any]:
        """Return the problems of a split, in a fixed order.

        Called once per environment and split. A problem is a JSON value that fully describes the task, since
        the task hash covers only the problem and the name of the class. For generated tasks, a `range` of
        seeds is enough.
        """

    @abstractmethod
    def start(self, problem: Any) -> str:
        """Begin the task and return the first observation."""

    @abstractmethod
    def act(self, action: str) -> tuple[str, float, bool]:
        """Execute an action, which may be any text, and return (observation, reward, done).

        A task that ends with a positive reward counts as solved, unless `info()` sets `success`.
        """

    def actions(self) -> Sequence[str] | None:
        """Return the admissible actions of the current state, or None for no list."""
        return None

    def info(self) -> Mapping[str, Any]:
        """Return further entries of `info` for the current state, such as score, task_type and state_key."""
        return {}

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split: "test/0", "test/1", …."""
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return TaskIds(split, len(self._of(split)))

    def task_hash(self, task: str) -> str:
        """Return the SHA-256 of the class name and the problem, as 64 hex digits."""
        return content_hash(task, type(self).__name__, find_problem(task, self.splits, self._of))

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or one drawn from the split, and return (observation, info)."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = f"{self.split}/{int(self.np_random.integers(len(self._of(self.split))))}"
        problem = find_problem(task, self.splits, self._of)
        self.task, self.steps, self._running, self._solved = task, 0, False, False
        observation = self.start(problem)
        self._running = True
        return observation, self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Execute an action and return (observation, reward, terminated, truncated, info).

        Raises:
            ResetNeeded: No episode is running.
        """
        if not self._running:
            raise ResetNeeded("the episode is over or has not begun: call reset first")
        offered = self.actions()
        observation, reward, done = self.act(action)
        self.steps += 1
        self._solved = bool(done) and reward > 0
        truncated = not done and self.steps >= self.max_steps
        self._running = not (done or truncated)
        info = self._info(valid=offered is None or action in offered)
        return observation, float(reward), bool(done), truncated, info

    def _info(self, valid: bool) -> dict[str, Any]:
        """Return the info of the current state."""
        info: dict[str, Any] = {"success": self._solved}
        offered = self.actions()
        if offered is not None:
            info |= {"actions": list(offered), "valid": valid}
        if self._tells_expert:
            expert = getattr(self, "expert")  # noqa: B009 - a subclass's, checked when constructed
            info["expert"] = expert() if self._running else None
        return info | dict(self.info())

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state of the episode, including the random number generator.

        All attributes are deep-copied. An environment with attributes that cannot be copied, such as a
        process, sets `snapshot = restore = None`.
        """
        if self.task is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return deepcopy({name: value for name, value in vars(self).items() if name not in _OUTSIDE_EPISODES})

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore a state from `snapshot` of this environment or of one with the same arguments."""
        kept = {name: vars(self)[name] for name in _OUTSIDE_EPISODES if name in vars(self)}
        vars(self).clear()
        vars(self).update(deepcopy(dict(snapshot)), **kept)

    def _of(self, split: str) -> Sequence[Any]:
        if split not in self._problems:
            self._problems[split] = self.problems(split)
        return self._problems[split]
