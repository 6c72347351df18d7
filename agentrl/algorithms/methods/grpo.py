"""GRPO and Dr. GRPO: returns are compared within the group."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.features import row_scores, turn_exists, turns_to_tokens
from agentrl.algorithms.hooks import (
    COMPARES,
    Advantage,
    Context,
    trait,
    traits,
)
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import Tokens
from agentrl.data.batch import Batch

Weighting = Literal["trajectory", "row"]
Estimate = Callable[[Tensor, Tensor], Tensor]


@recipe("grpo")
@dataclass(frozen=True)
class GRPO(ClippedRecipe):
    """Group-relative policy optimisation: returns normalised within the group, a clipped ratio, no critic.

        A    = (R - mean R) / (std R + 1e-6),   over the episodes of the group
        loss = mean of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    The preset `released` weights by rows, so that a long trajectory moves the mean more, and clamps the k3
    divergence to +-10.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | sequence   | token    | sequence
        kl_coefficient    | 0.04       | 0.0      | 0.0
        drop_equal_groups | false      | false    | true
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    The published runs used groups of 64, a learning rate of 1e-6 and one update per batch. The released code
    is verl-agent, whose scripts for text games add kl_coefficient 0.01 and invalid_penalty 0.1.

    Args:
        divide_by_std: Whether to divide centred returns by their standard deviation within the group.
        weighting: What is compared within a group: `trajectory` compares the returns of trajectories; `row`
            compares turns, each with the return of its episode less only its own invalid penalty.
        singleton: The advantage of the only member of a group: `zero`, or its `raw` return.

    The remaining fields are those of `ClippedRecipe`.

    Source: Shao et al. 2024, arXiv:2402.03300.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 0.04},
        "released": {"weighting": "row", "singleton": "raw"},
    }
    OFFICIAL: ClassVar[Collection[str]] = (*ClippedRecipe.OFFICIAL, "weighting", "singleton")

    divide_by_std: bool = True
    weighting: Weighting = "trajectory"
    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        estimate = partial(
            functional.group_relative_advantage,
            divide_by_std=self.divide_by_std,
            singleton=self.singleton,
        )
        advantage = partial(
            compare_in_groups,
            estimate=estimate,
            weighting=self.weighting,
            invalid_penalty=self.invalid_penalty,
        )
        return replace(super().build(), advantage=mark_comparing(advantage, self.singleton))


@recipe("dr_grpo")
@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO done right: no division by the standard deviation, and no discount for long trajectories.

        A    = R - mean R,   over the episodes of the group
        loss = mean over episodes of (sum of token losses / sequence_length)

    The fields are those of `grpo`; three defaults differ.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | constant   | constant | constant
        sequence_length   | 3000       | 32       | 32
        kl_coefficient    | 0.0        | 0.0      | 0.0
        drop_equal_groups | false      | false    | true
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    The paper divides by the maximum number of reply tokens, 3000 in its runs (groups of 8, learning rate
    1e-6); `sequence_length` 32 suits short commands. The released code is verl-agent, which divides by the
    width of the padding. That is not reproduced, so `released` has our value.

    Source: Liu et al. 2025, arXiv:2503.20783.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 0.0, "sequence_length": 3000},
        "released": {"aggregation": "constant"},
    }
    OFFICIAL: ClassVar[Collection[str]] = tuple(name for name in GRPO.OFFICIAL if name != "aggregation")

    divide_by_std: bool = False
    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "constant"
    sequence_length: Tokens | None = 32


def compare_in_groups(
    batch: Batch, context: Context, *, estimate: Estimate, weighting: Weighting, invalid_penalty: float
) -> Tensor:
    """Compare returns within their groups, and give every action token the result; [B, T] float64.

    Args:
        batch: The batch of the returns.
        context: Not read.
        estimate: (returns, groups) -> advantages, one per return.
        weighting: `trajectory` compares trajectories by their returns, `row` compares turns by `row_scores`.
        invalid_penalty: The penalty contained in the rewards of invalid turns, for `row`.
    """
    if weighting == "trajectory":
        return functional.broadcast_to_tokens(
            estimate(batch.returns, batch.groups), batch.trajectory, batch.action_mask
        )
    scores, exists = row_scores(batch, invalid_penalty), turn_exists(batch)
    compared = torch.zeros_like(scores)
    compared[exists] = estimate(scores[exists], batch.groups[:, None].expand_as(scores)[exists])
    return turns_to_tokens(compared, batch)


def mark_comparing(advantage: Advantage, singleton: functional.Singleton) -> Advantage:
    """Mark an advantage as comparing within a group, unless a `singleton` has an advantage of its own."""
    return trait(COMPARES, *traits(advantage))(advantage) if singleton == "zero" else advantage
