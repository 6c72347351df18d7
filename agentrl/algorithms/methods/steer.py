"""STEER: lower weights for the tokens whose update changes the entropy most."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, require_tensor, requires, token_statistic
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, PositiveWeight

LOWEST, SMALLEST = 1e-8, 0.02  # of probabilities, and of the largest change in exponential weights
EQUAL = 1e-6  # changes whose range is a smaller part of the largest differ by rounding only


@recipe("steer")
@dataclass(frozen=True)
class STEER(Recipe):
    """Stabilising token-level entropy change: a token weighs less, the more its update moves the entropy.

        approximate: c = |A ratio (1 - p) (log p + H)|
        exact:       c = |A ratio (p (log p + H) - sum_v p_v^2 (log p_v + H))|
        w = high - (high - low) (c - min c) / (max c - min c),   or exponentially
        w = max(low, exp(-k c)),   k = -log(low) / max(max c, 0.02)

    p is the probability of the token and H the entropy, both under the current policy. The loss of a token is
    w times that of the base; the normaliser stays. Minimum and maximum are over the tokens of the mini-batch
    that are in the surrogate; the released code takes those of a micro-batch. With low and high 1 it is its
    base.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.clip_high      | 0.28  | 0.28     | 0.2
        base.dual_clip      | 10.0  | 10.0     | null
        base.kl_coefficient | 0.0   | 0.0      | 0.0

    The values are those of the released code, in which no factor of c is squared, although a name says so; we
    do not know whether the paper squares one.

    Args:
        base: The recipe whose loss is weighted.
        low: The lowest weight.
        high: The highest weight of linear weights; that of exponential ones is 1.
        exponential: Whether the weight falls exponentially with the change instead of linearly.
        metric: What c is: that of the released code, or the `exact` change of first order by a step on the
            logits along the gradient of the token.

    Source: Hao et al. 2025, arXiv:2510.10150.
    """

    KIND = "token selection"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {
            "base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}
            | {"clip_high": 0.28, "dual_clip": 10.0}
        },
        "released": {"base": {"name": "grpo", "preset": "released", "clip_high": 0.28, "dual_clip": 10.0}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    low: PositiveShare = 0.8
    high: PositiveWeight = 1.2
    exponential: bool = False
    metric: Literal["approximate", "exact"] = "approximate"

    def build(self) -> Algorithm:
        """Build the base with weighted tokens."""
        base = self.base.build()
        weigh = partial(exponential_weights, low=self.low)
        if not self.exponential:
            weigh = partial(linear_weights, low=self.low, high=self.high)
        weights = partial(steer, weigh=weigh, exact=self.metric == "exact")
        if self.metric == "exact":
            weights = requires("entropy_change")(weights)
        return replace(base, weights=(*base.weights, weights))

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [(self.high < self.low, f"high is {self.high}, wanted at least low, {self.low}")]


@requires("current")
def steer(mini: MiniBatch, context: Context, *, weigh: Callable[[Tensor], Tensor], exact: bool) -> Tensor:
    """Return the weight of each token by its change of the entropy; [B, T] float64, 1 if not counted."""
    changes = entropy_changes(mini.now, mini.advantages, exact=exact)[mini.counted]
    weights = torch.ones_like(mini.advantages, dtype=torch.float64)
    if len(changes):
        weights[mini.counted] = weigh(changes)
    return weights


def entropy_changes(outputs: Outputs, advantages: Tensor, *, exact: bool = False) -> Tensor:
    """Estimate how far the update of each token alone moves the entropy, as `STEER` says; [B, T] float64.

    The unit is nats times that of the advantages. p is within [1e-8, 1 - 1e-8]. What is not finite is 0.
    """
    logprobs = outputs.logprobs.double().clamp(math.log(LOWEST), math.log1p(-LOWEST))
    slope = logprobs + outputs.entropies
    if exact:
        slope = logprobs.exp() * slope - token_statistic(outputs, "entropy_change")
    else:
        slope = (1 - logprobs.exp()) * slope
    changes = advantages.double() * require_tensor(outputs.ratio, "ratio") * slope
    return changes.abs().nan_to_num(nan=0.0, posinf=0.0)


def linear_weights(changes: Tensor, *, low: float, high: float) -> Tensor:
    """Map the smallest change to `high` and the largest to `low`, linearly; equal ones to the middle; [N]."""
    span = changes.max() - changes.min()
    if span <= EQUAL * changes.max():
        return torch.full_like(changes, (low + high) / 2)
    return high - (high - low) * (changes - changes.min()) / span


def exponential_weights(changes: Tensor, *, low: float) -> Tensor:
    """Map no change to 1 and the largest to `low`, exponentially; [N]."""
    rate = -math.log(low) / changes.max().clamp(min=SMALLEST)
    return (-rate * changes).exp().clamp(min=low)
