"""Branching: which episodes a task gets, decided while they are played."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentrl.algorithms.hooks import (
    Coefficient,
    Context,
)
from agentrl.data.trajectory import BranchPoint, Episode, Turn


class Growth(Protocol):
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


Grow = Callable[[int, int, Context], Growth]


@dataclass(frozen=True)
class RolloutPlan:
    """Settings of the rollout that an algorithm asks for.

    Args:
        temperature: The sampling temperature as a function of the context; None takes the configured one.
        rounds: The maximum number of rounds in which a step's tasks are drawn and played until `select` has
            kept as many groups as configured. The groups of the last round fill up what is missing.
        episodes: The number of episodes per task; None takes the configured group size.
        grow: (episodes of the task, seed, context) -> the policy that decides where episodes start; None
            starts all of them at the first observation.
    """

    temperature: Coefficient | None = None
    rounds: int = 1
    episodes: int | None = None
    grow: Grow | None = None
