"""Self-imitation: the base class of recipes that train again on good episodes of earlier steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import EQUAL_RETURNS, ReplayLoss
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import Base, Recipe, build_recipe
from agentrl.algorithms.replay import ReplayBuffer
from agentrl.config import Count, OptionalCount, PositiveShare, Weight
from agentrl.data.trajectory import Episode
from agentrl.schedule import cosine_warmup


@dataclass(frozen=True)
class SelfImitation(Recipe):
    """Base class of recipes that replay a base's rows with recomputed advantages.

        A = R - median of recent groups' mean returns,   for replayed rows

    R is the shaped return of the row's trajectory in its own step. For when and how many rows are replayed,
    see `ReplayBuffer`. With the preset `released`, the buffer follows the released code, schedules count
    steps from 1, and with `advantage_decay` every stored row counts as good enough.

    Args:
        base: The recipe whose loss on the rollout is extended.
        buffer_size: The maximum number of rows in a sample; rows are sampled once 1.5 times as many are good
            enough. Rows are trajectories, as long as prompts extend each other.
        baseline_size: The number of mean returns in the median.
        tolerate_steps: The maximum age of a sampled row, in steps.
        coefficient: The coefficient of the replay loss; 0 turns replay off.
        warmup: The number of training steps in which the coefficient rises from 0 along half a cosine; 0
            starts at the full value.
        advantage_decay: null for the advantage above; otherwise a row keeps its original advantage, times
            this.
        mode: `burst` takes optimiser steps on replayed rows alone, and then empties the buffer; `mixed` adds
            a part of the replayed rows to every optimiser step of the rollout batch.
    """

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    buffer_size: Count = 32
    baseline_size: Count = 10240
    tolerate_steps: Count = 5
    coefficient: Weight = 1.0
    warmup: OptionalCount = 30
    advantage_decay: PositiveShare | None = None
    mode: Literal["burst", "mixed"] = "burst"

    @property
    def first_step(self) -> int:
        """Return the number of the first training step in the schedules."""
        return 1 if self.preset == "released" else 0

    def replay_coefficient(self, context: Context) -> float:
        """Return the coefficient of the replay loss in this step."""
        return self.coefficient * cosine_warmup(context.step + self.first_step, self.warmup)

    def replay_buffer(
        self, replayed: ReplayLoss, episode_filter: Callable[[Episode], bool] | None = None
    ) -> ReplayBuffer:
        """Make an empty buffer.

        Args:
            replayed: Maps the algorithm of the run to the one that defines the loss of replayed rows.
            episode_filter: Says which episodes are kept at all; None keeps all.
        """
        decay, released = self.advantage_decay, self.preset == "released"
        return ReplayBuffer(
            replayed,
            size=self.buffer_size,
            baselines=self.baseline_size,
            tolerance=self.tolerate_steps,
            coefficient=self.replay_coefficient,
            recompute_advantage=recalibrated if decay is None else partial(decayed, factor=decay),
            episode_filter=episode_filter,
            mixed=self.mode == "mixed",
            released=released,
            count_all=released and decay is not None,
        )


def recalibrated(advantages: Tensor, episode_return: float, baseline: float) -> Tensor:
    """Return the return less the baseline, at every token; [T] reward units, 0 if equal up to rounding."""
    gain = episode_return - baseline
    return torch.full_like(advantages, gain if abs(gain) > EQUAL_RETURNS else 0.0)


def decayed(advantages: Tensor, episode_return: float, baseline: float, *, factor: float) -> Tensor:
    """Return the original advantages, times a factor; [T]."""
    return advantages * factor
