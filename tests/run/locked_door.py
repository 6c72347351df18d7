"""An environment with an argument of its caller's, in a file that a worker loads without torch."""

from typing import Any, ClassVar

import gymnasium

from agentrl.env import TextSpace, register

ENV = "trust-tests/Door-v0"


class Door(gymnasium.Env[str, str]):
    """Two steps; `lock` is its caller's to choose."""

    splits = ("train", "test")
    callers_arguments: ClassVar[tuple[str, ...]] = ("lock",)
    observation_space = action_space = TextSpace()
    locks: ClassVar[list[str]] = []

    def __init__(
        self, split: str = "train", max_steps: int = 2, lock: str = "shut", hue: str = "red"
    ) -> None:
        self.max_steps, self.left, self.hue = max_steps, 0, hue
        self.locks.append(lock)

    def tasks(self, split: str) -> list[str]:
        return [f"{split}/{number}" for number in range(3)]

    def task_hash(self, task: str) -> str:
        return f"{self.tasks(task.partition('/')[0]).index(task):064x}"

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = self.max_steps
        return f"a {self.hue} door", {"success": False, "actions": ["open", "knock"]}

    def step(self, action: str) -> Any:
        self.left -= 1
        done = action == "open"
        info = {"success": done, "actions": ["open", "knock"]}
        return "a door", float(done), done, self.left == 0 and not done, info


register(ENV, Door)
