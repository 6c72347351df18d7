"""A small correct environment for the tests: doors in a row, and the treasure behind one of them."""

import hashlib
import random
from typing import Any, ClassVar

import gymnasium

from agentrl.env import TextSpace, unknown
from agentrl.errors import ConfigError, EnvironmentContractError

SIZES = {"train": 20, "test": 6}
DOORS = 6


class Corridor(gymnasium.Env[str, str]):
    """Walk to the named door and open it. What the weather is like depends on the seed."""

    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    determinism: ClassVar[str] = "episode"
    thread_safe: ClassVar[bool] = True
    data: ClassVar[str] = "generated"

    def __init__(
        self, split: str = "train", max_steps: int = 12, expert: bool = False, doors: int = DOORS
    ) -> None:
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        if max_steps < 1:
            raise ConfigError(f"max_steps is {max_steps}, wanted at least 1")
        self.observation_space, self.action_space = TextSpace(), TextSpace()
        self.split, self.max_steps, self.tells, self.doors = split, max_steps, expert, doors
        self.weather, self.at, self.running = random.Random(0), 0, False
        self.resets = 0

    def tasks(self, split: str) -> list[str]:
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        return [f"{split}-{index}" for index in range(SIZES[split])]

    def goal(self, task: str) -> int:
        split, _, index = task.partition("-")
        if split not in self.splits or not index.isdigit() or int(index) >= SIZES[split]:
            raise unknown("task", task, self.tasks(self.split))
        return 1 + (int(index) * 7 + len(split)) % (self.doors - 1)

    def task_hash(self, task: str) -> str:
        return hashlib.sha256(f"{self.doors} doors, the {self.goal(task)}th".encode()).hexdigest()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = f"{self.split}-{int(self.np_random.integers(SIZES[self.split]))}"
        self.target = self.goal(task)
        self.weather = random.Random(f"{seed}/{task}")
        self.at, self.steps, self.won, self.understood, self.running = 0, 0, False, True, True
        self.resets += 1
        return f"Open door {self.target}. {self.view()}", self.info()

    def view(self) -> str:
        return f"You stand at door {self.at} and it is {self.weather.choice(['sunny', 'rainy', 'windy'])}."

    def actions(self) -> list[str]:
        return [f"open {self.at}"] + ["go left"] * (self.at > 0) + ["go right"] * (self.at < self.doors - 1)

    def info(self) -> dict[str, Any]:
        info = {
            "success": self.won,
            "actions": self.actions(),
            "valid": self.understood,
            "score": float(self.won),
            "task_type": "even" if self.target % 2 == 0 else "odd",
            "state_key": f"{self.target}/{self.at}",
        }
        return info | ({"expert": self.expert()} if self.tells else {})

    def expert(self) -> str | None:
        return (
            f"open {self.at}"
            if self.at == self.target
            else "go right"
            if self.at < self.target
            else "go left"
        )

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self.running:
            raise EnvironmentContractError("no episode is running: call reset() first")
        self.steps += 1
        self.understood = action in self.actions()
        if self.understood and action.startswith("go"):
            self.at += 1 if action == "go right" else -1
        self.won = self.understood and action == f"open {self.target}"
        truncated = self.steps >= self.limit() and not self.won
        self.running = not (self.won or truncated)
        text = self.view() if self.understood else "Nothing happens."
        return text, float(self.won), self.won, truncated, self.info()

    def limit(self) -> int:
        return self.max_steps

    def snapshot(self) -> tuple[Any, ...]:
        return self.target, self.at, self.steps, self.won, self.running, self.weather.getstate()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self.target, self.at, self.steps, self.won, self.running, weather = snapshot
        self.weather.setstate(weather)
