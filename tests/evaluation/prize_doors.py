"""An environment with a prize behind one of two doors, in a file that a worker loads without torch."""

import hashlib
from collections.abc import Sequence
from typing import Any

import gymnasium

from agentrl.env import TextSpace, register

ENV = "agentrl-tests/Doors-v0"


class Doors(gymnasium.Env[str, str]):
    """Behind the left or the right door is the task's prize; `salt` is part of every task's content."""

    splits = ("train", "held_out")
    determinism = "episode"
    data = "made up"
    salt = ""
    breaks: tuple[str, ...] = ()
    asked: list[str]

    def __init__(self, split: str = "train", max_steps: int = 3, expert: bool = False) -> None:
        self.observation_space = self.action_space = TextSpace()
        self._split, self._max_steps, self._expert = split, max_steps, expert

    def tasks(self, split: str) -> Sequence[str]:
        return [f"{split}-{side}-{index}" for index in range(5) for side in ("left", "right")]

    def task_hash(self, task: str) -> str:
        return hashlib.sha256(f"{self.salt}{task}".encode()).hexdigest()

    def other_goal(self, task: str) -> str | None:
        if task.endswith("-4"):
            return None
        return task.replace("left", "?").replace("right", "left").replace("?", "right")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self._task = (options or {}).get("task") or f"{self._split}-left-0"
        self._steps = 0
        if self._task in self.breaks:
            raise RuntimeError("the door is stuck")
        return f"Your prize is behind the {self._side}.", self._info("")

    @property
    def _side(self) -> str:
        return self._task.split("-")[1]

    def _info(self, action: str) -> dict[str, Any]:
        info: dict[str, Any] = {
            "success": action == self._side,
            "other_success": action in {"left", "right"} - {self._side},
            "actions": ["left", "right", "wait"],
            "task_type": self._side,
        }
        return info | ({"expert": self._side} if self._expert else {})

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        info = self._info(action)
        opened = action in ("left", "right")
        return "…", float(info["success"]), opened, not opened and self._steps >= self._max_steps, info


register(ENV, Doors)
