"""CANON: returns compared between the halves of a group with more and with less entropy."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.hooks import Context, requires
from agentrl.algorithms.methods.grpo import DrGRPO, mark_comparing
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import Share, SignedWeight, Tokens, Weight
from agentrl.data.batch import Batch
from agentrl.schedule import cosine_restarts

Measure = Literal["entropy", "length"]


@recipe("canon")
@dataclass(frozen=True)
class CANON(ClippedRecipe):
    """Conditional advantage estimation: returns are compared with those of the other half of the group.

        A[high] = mix (R - alpha mean R[low] + beta) + (1 - mix) (R - mean R[high])
        A[low]  = mix (alpha R - mean R[high] - beta) + (1 - mix) (R - mean R[low])

    Of the n episodes of a group, the floor(n / 2) with the lowest mean entropy of the action tokens before
    the update are low, and the others high; ties keep the order of the group. If episodes are compared by
    their `length` in action tokens, alpha multiplies the other summand: alpha R in the long half, and the
    mean of the long half in the short one. With mix 0.5, alpha 1, beta 0 and equal halves, it is Dr. GRPO.

        field             | paper    | released | ours
        dual_clip         | null     | 3.0      | null
        clip_high         | 0.28     | 0.28     | 0.2
        aggregation       | constant | constant | constant
        sequence_length   | 8192     | 8192     | 32
        drop_equal_groups | false    | false    | true
        singleton         | zero     | raw      | zero

    The published runs use groups of 16 and divide by the maximum length of a reply, 8192; 32 suits short
    commands. With the schedule `restarts`, 1 - mix rises to `peak` over the first fifth of the run and then
    falls to 0 three times, each along half a cosine; with `reversed`, mix does. The published numbers are 30
    of 150 steps, 3 cycles and 0.6; the form of the rise is ours.

    Args:
        measure: What is compared between the episodes of a group.
        mix: The share of the comparison with the other half; the rest is with the own half.
        alpha: Below 1, the half with more entropy, or with fewer tokens, is preferred.
        beta: The bonus of the half with more entropy, or with more tokens, and the malus of the other.
        schedule: Whether mix is `constant`, or changes over the run.
        peak: The highest value of what follows the schedule.
        singleton: As in `grpo`.

    The remaining fields are those of `ClippedRecipe`.

    Source: Chen et al. 2025, arXiv:2509.23962.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"clip_high": 0.28, "sequence_length": 8192},
        "released": {"clip_high": 0.28, "sequence_length": 8192}
        | {"aggregation": "constant", "singleton": "raw"},
    }
    OFFICIAL: ClassVar[Collection[str]] = DrGRPO.OFFICIAL

    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "constant"
    sequence_length: Tokens | None = 32
    measure: Measure = "entropy"
    mix: Share = 1.0
    alpha: Weight = 1.0
    beta: SignedWeight = 0.0
    schedule: Literal["constant", "restarts", "reversed"] = "constant"
    peak: Share = 0.6
    singleton: functional.Singleton = "zero"

    def build(self) -> Algorithm:
        """Build the algorithm."""
        measured = "episode_entropy" if self.measure == "entropy" else "episode_tokens"
        advantage = requires(measured)(partial(self.compare, measured=measured))
        return replace(super().build(), advantage=mark_comparing(advantage, self.singleton))

    def mix_at(self, context: Context) -> float:
        """Return the share of the comparison with the other half in this step."""
        total = context.total_steps
        part = self.peak * cosine_restarts(context.step, total, cycles=3, warmup=total // 5)
        return {"constant": self.mix, "restarts": 1 - part, "reversed": part}[self.schedule]

    def compare(self, batch: Batch, context: Context, *, measured: str) -> Tensor:
        """Compare returns between the halves of their group and within them; [B, T] float64."""
        returns, mix, alpha = batch.returns, self.mix_at(context), self.alpha
        _, member, sizes = batch.groups.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        # Rounded, so that ties do not depend on floating-point noise.
        values = feature_of(batch, measured).double().round(decimals=9)
        high = upper_half(values, member, sizes)
        own, other = _half_means(returns, member, high, len(sizes))
        # In this half alpha multiplies the other mean, elsewhere the own return.
        favoured = high == (self.measure == "entropy")
        between = torch.where(favoured, returns - alpha * other, alpha * returns - other)
        between = between + self.beta * (2 * high.to(returns) - 1)
        values = mix * between + (1 - mix) * (returns - own)
        alone = returns if self.singleton == "raw" else torch.zeros_like(returns)
        values = torch.where(sizes[member] == 1, alone, values)
        return functional.broadcast_to_tokens(values, batch.trajectory, batch.action_mask)


def upper_half(values: Tensor, member: Tensor, sizes: Tensor) -> Tensor:
    """Return whether one of [E] is not among the floor(n / 2) lowest of its group; ties keep their order."""
    order = values.argsort(stable=True)
    order = order[member[order].argsort(stable=True)]
    rank = torch.empty_like(member)
    rank[order] = torch.arange(len(order), device=rank.device) - (sizes.cumsum(0) - sizes)[member[order]]
    return rank >= sizes[member] // 2


def _half_means(returns: Tensor, member: Tensor, high: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean return of the own and of the other half of each trajectory's group; [E] each."""
    lowest = torch.full((groups,), torch.inf, dtype=returns.dtype, device=returns.device)
    lowest = lowest.scatter_reduce(0, member, returns, "amin")[member]
    half = 2 * member + high
    # Subtracting the minimum first keeps equal returns at exactly 0, whatever their binary rounding.
    total = torch.zeros(2 * groups, dtype=returns.dtype, device=returns.device)
    total = total.index_add(0, half, returns - lowest)
    means = total / torch.bincount(half, minlength=2 * groups).clamp(min=1)
    return lowest + means[half], lowest + means[half ^ 1]
