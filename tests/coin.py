"""An environment of the tests of the commands, in a file that a worker loads without torch."""

import hashlib
from collections.abc import Sequence
from typing import Any

import gymnasium

from agentrl.env import TextSpace, register

ENV = "agentrl-tests/Coin-v0"


class Coin(gymnasium.Env[str, str]):
    """Take the coin; `look` changes nothing."""

    splits = ("train", "held_out")
    data = "made up"
    fails = False

    def __init__(self, split: str = "train", max_steps: int = 3, expert: bool = False) -> None:
        self.observation_space = self.action_space = TextSpace()
        self._split, self._max_steps, self._expert, self._steps = split, max_steps, expert, 0

    def tasks(self, split: str) -> Sequence[str]:
        return [f"{split}-{index}" for index in range(4)]

    def task_hash(self, task: str) -> str:
        return hashlib.sha256(task.encode()).hexdigest()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        if self.fails:
            raise RuntimeError("out of coins")
        self._steps = 0
        task = (options or {}).get("task") or f"{self._split}-0"
        return f"A coin, \x1b[31m{task}.", self._info(False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        won = action == "take coin"
        return f"You {action}.", float(won), won, not won and self._steps >= self._max_steps, self._info(won)

    def _info(self, success: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"success": success, "actions": ["look", "take coin"]}
        return info | ({"expert": "take coin"} if self._expert else {})


register(ENV, Coin)
