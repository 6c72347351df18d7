"""The `rollout` block of a run's configuration."""

from dataclasses import dataclass
from typing import Literal

from agentrl.errors import ConfigError


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are collected.

    Args:
        backend: on whose machines environments run.
        placement: where an environment lives; `inline` is the collector's own process.
        groups_per_step: tasks played in one training step.
        group_size: episodes of each task, whose returns are compared.
        max_active: episodes in flight at once.
        max_turns: limit on turns beside the environment's own; None leaves it to the environment.
        temperature: of the policy's replies while training.
        constrained: choose among the admissible commands by a token trie; False generates freely and parses.
        max_aborted_share: a step with a larger share of aborted episodes stops the run.
    """

    backend: Literal["local"] = "local"
    placement: Literal["inline"] = "inline"
    groups_per_step: int = 8
    group_size: int = 8
    max_active: int = 64
    max_turns: int | None = None
    temperature: float = 1.0
    constrained: bool = True
    max_aborted_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "group_size", "max_active"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}, wanted at least 1")
        if self.temperature <= 0:
            raise ConfigError(f"rollout.temperature is {self.temperature}, wanted above 0 to explore")
        if not 0 <= self.max_aborted_share <= 1:
            raise ConfigError(f"rollout.max_aborted_share is {self.max_aborted_share}, wanted within [0, 1]")
