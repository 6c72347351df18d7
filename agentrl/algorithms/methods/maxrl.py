"""MaxRL: centred returns in units of the group's mean, so that rare successes count most."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.features import turn_penalties
from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.grpo import mark_comparing
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.data.batch import Batch


@recipe("maxrl")
@dataclass(frozen=True)
class MaxRL(ClippedRecipe):
    """Maximum-likelihood RL: centred returns over the group's mean return.

        A = (R - mean R) / mean R',   0 if mean R' is not above 0,   over the episodes of the group

    R' is the return without the penalties of invalid actions: they count in R, but with them the mean could
    be near 0 or negative. This is ours; the published form has one R. Rewards should be at least 0. Of
    groups with equal returns nothing is learned, as in `grpo`.

        field             | paper    | released | ours
        dual_clip         | null     | 3.0      | null
        aggregation       | sequence | token    | sequence
        drop_equal_groups | false    | false    | true
        singleton         | zero     | raw      | zero

    The advantage is that of two public implementations, prime-rl and SkyRL, of which the second adds 1e-6 to
    the mean, which is not reproduced, and leaves the return of a single episode raw (`released`). The other
    published settings are not known to us, so those of the table are the ones of `grpo`.

    Args:
        singleton: As in `grpo`.

    The remaining fields are those of `ClippedRecipe`.

    Source: Tajwar et al. 2026, arXiv:2602.02710.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {"released": {"singleton": "raw"}}
    OFFICIAL: ClassVar[Collection[str]] = (*ClippedRecipe.OFFICIAL, "singleton")

    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        advantage = partial(relative_to_mean, penalty=self.invalid_penalty, singleton=self.singleton)
        return replace(super().build(), advantage=mark_comparing(advantage, self.singleton))


def relative_to_mean(
    batch: Batch, context: Context, *, penalty: float, singleton: functional.Singleton
) -> Tensor:
    """Divide centred returns by the mean of their group, taken without penalties; [B, T] float64.

    Args:
        batch: The batch of the returns.
        context: Not read.
        penalty: The penalty contained in the rewards of invalid turns.
        singleton: The advantage of the only episode of a group.
    """
    centred = functional.group_relative_advantage(
        batch.returns, batch.groups, divide_by_std=False, singleton=singleton
    )
    earned = batch.returns + turn_penalties(batch, penalty).sum(dim=1)
    _, member, sizes = batch.groups.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    mean = (torch.zeros_like(sizes, dtype=earned.dtype).index_add(0, member, earned) / sizes)[member]
    values = torch.where(mean > 0, centred / torch.where(mean > 0, mean, 1.0), 0.0)
    if singleton == "raw":
        values = torch.where(sizes[member] == 1, centred, values)
    return functional.broadcast_to_tokens(values, batch.trajectory, batch.action_mask)
