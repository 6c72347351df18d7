"""Environments built from simpler parts, such as a list of problems and a grading function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium

from agentrl.env.names import unknown
from agentrl.env.numbers import MAX_STEPS, whole_number
from agentrl.env.problems import TaskIds, find_problem, hash_json
from agentrl.env.spaces import TextSpace
from agentrl.errors import ConfigError, EnvironmentContractError

Problem = Mapping[str, Any]


class OneStepEnv(gymnasium.Env[str, str]):
    """Environment whose episodes have one step: the prompt is observed, and the reply is graded.

    A problem is a mapping of JSON values with at least `prompt`. An entry `task_type` is copied to `info`.
    The task id is "split/index", and the task hash covers the whole problem.

    >>> problems = {"train": [{"prompt": "2 + 3 = ?", "answer": "5"}]}
    >>> env = OneStepEnv(problems, lambda problem, reply: float(problem["answer"] in reply))
    >>> env.reset(options={"task": "train/0"})[0]
    '2 + 3 = ?'
    >>> env.step("It is 5.")[1]
    1.0

    Args:
        tasks: The problems of each split.
        grade: A function from (problem, reply) to the reward.
        split: The split that `reset` draws a task from if none is given; None takes the first split.
        success_at: The minimum reward of a solved problem.
        max_steps: Any positive number, since every episode has one step.
        data: A label shown with every score, such as "generated".
        solve: A function from a problem to a reply that solves it, or None; it makes the environment declare
            an expert.
        expert: Whether to put the reply of `solve` into `info["expert"]`.
    """

    determinism: ClassVar[Literal["episode", "instance"]] = "episode"

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Problem]],
        grade: Callable[[Problem, str], float],
        *,
        split: str | None = None,
        success_at: float = 1.0,
        max_steps: int = 1,
        data: str | None = None,
        solve: Callable[[Problem], str | None] | None = None,
        expert: bool = False,
    ) -> None:
        if not tasks or not all(tasks.values()):
            raise ConfigError("OneStepEnv: wanted at least one split, and in each at least one problem")
        whole_number("max_steps", max_steps, 1, MAX_STEPS)
        if expert and solve is None:
            raise ConfigError("OneStepEnv: expert is True, but no answers to these problems are known")
        self.splits: tuple[str, ...] = tuple(tasks)
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.max_steps = 1
        self.data = data
        self._problems = tasks
        self._grade = grade
        self._split = self._known(split or self.splits[0])
        self._success_at = success_at
        self._problem: Problem | None = None
        self._solve = solve
        self._tells_expert = expert
        if solve is None:
            vars(self)["expert"] = None  # hides the method, so that no expert is declared

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split."""
        return TaskIds(self._known(split), len(self._problems[split]))

    def task_hash(self, task: str) -> str:
        """Return the SHA-256 of the problem as canonical JSON, as 64 hex digits."""
        return hash_json(task, self._find(task))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or one drawn from the split, and return (prompt, info)."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = self.tasks(self._split)[int(self.np_random.integers(len(self._problems[self._split])))]
        self._problem = self._find(task)
        info = self._info(self._problem, 0.0) | {"success": False}
        return self._problem["prompt"], info | ({"expert": self.expert()} if self._tells_expert else {})

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Grade the reply and end the episode.

        Raises:
            EnvironmentContractError: No episode is running.
        """
        if self._problem is None:
            raise EnvironmentContractError("OneStepEnv: step() without a running episode; call reset() first")
        problem, self._problem = self._problem, None
        reward = float(self._grade(problem, action))
        return "", reward, True, False, self._info(problem, reward)

    def expert(self) -> str | None:
        """Return a reply that solves the current problem; None if unknown, or after the end."""
        return None if self._problem is None or self._solve is None else self._solve(self._problem)

    def snapshot(self) -> Problem | None:
        """Return the state of the episode, which is the current problem."""
        return self._problem

    def restore(self, snapshot: Problem | None) -> None:
        """Restore a state from `snapshot`."""
        self._problem = snapshot

    def _info(self, problem: Problem, score: float) -> dict[str, Any]:
        info: dict[str, Any] = {"success": score >= self._success_at, "score": score}
        if "task_type" in problem:
            info["task_type"] = problem["task_type"]
        return info

    def _known(self, split: str) -> str:
        if split not in self._problems:
            raise unknown("split", split, self._problems)
        return split

    def _find(self, task: object) -> Problem:
        problem: Problem = find_problem(task, self.splits, self._problems.__getitem__)
        return problem
