"""Branching: which episodes a task gets, decided while they are played."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentrl.algorithms.hooks import (
    Coefficient,
    Context,
)
from agentrl.data.trajectory import BranchPoint, Episode, Turn


class BranchPolicy(Protocol):
    """Which episodes one task gets, decided while they are played.

    A start is None for an episode from the first observation, or the point of another episode at which the
    new one leaves it: `BranchPoint(parent, turn, token)` begins in the state before that turn, with that many
    tokens of the parent's reply. The rollout names the episodes, never starts more than the budget, and fills
    up with episodes from the first observation when all have ended and some are left.
    """

    def begin(self) -> Sequence[BranchPoint | None]:
        """What is started first."""
        ...

    def reached(
        self, episode: str, parent: BranchPoint | None, turns: Sequence[Turn]
    ) -> Sequence[BranchPoint | None]:
        """What is started when the environment has answered the last of `turns` and the episode goes on.

        `turns` are those since the first observation, the parent's included.
        """
        ...

    def ended(self, episode: Episode) -> Sequence[BranchPoint | None]:
        """What is started when an episode has ended, for good or aborted."""
        ...


BranchPolicyFactory = Callable[[int, int, Context], BranchPolicy]


@dataclass(frozen=True)
class RolloutPlan:
    """What an algorithm asks of the rollout.

    Args:
        temperature: of sampling, by step; None leaves it to the configuration.
        rounds: times that a step's tasks are drawn and played at most, until `select` has kept as many
            groups as the configuration wants; the last round's groups all fill up what is missing.
        episodes: of each task; None takes the configuration's group size.
        branch_policy: (episodes of the task, seed, context) -> which they are; None starts all from the first
            observation.
    """

    temperature: Coefficient | None = None
    rounds: int = 1
    episodes: int | None = None
    branch_policy: BranchPolicyFactory | None = None
