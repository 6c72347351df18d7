"""DCPO: the entropy is held at a target by weighing good tokens as another temperature would sample them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import (
    TOKEN_TRANSFORM,
    Context,
    MiniBatch,
    require_tensor,
    requires,
    steers_entropy,
    token_statistic,
    trait,
)
from agentrl.algorithms.methods.arbitrary_entropy import Colder, Hotter
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Weight
from agentrl.data.batch import Batch

GOOD = 0.05  # an episode with a return above it counts as good


@recipe("dcpo")
@dataclass(frozen=True)
class DCPO(Recipe):
    """Entropy control without a second rollout: good tokens are weighed by p_T / p of another temperature.

        T  = high if H <= target else low,   times the temperature of the step
        a0 = min(|target - H|, reach) / (share of the episodes with a return above 0.05),   a = a0 / (1 + a0)
        A' = (1 - a) A + a p_T(token) / p(token) [return > 0.05]

    It is in the released code of arXiv 2510.08141, next to `arbitrary_entropy`. H is the mean entropy of the
    action tokens before the update, in nats. Where no episode is good, the advantages are those of the base,
    as with reach 0. It plays as many episodes as its base.

        field       | paper | released | ours
        base.name   | grpo  | grpo     | grpo
        base.preset | ours  | released | ours
        target      | 0.75  | 0.5      | 0.5

    Args:
        base: The recipe whose advantages are changed.
        target: The entropy to reach, in nats.
        high: The factor of the temperature up to the target.
        low: The factor of the temperature above it.
        reach: The distance from the target at which the change is largest, in nats.

    Source: Wang et al. 2025, arXiv:2510.08141.
    """

    KIND = "entropy"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"target": 0.75},
        "released": {"base": {"name": "grpo", "preset": "released"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    target: Weight = 0.5
    high: Hotter = 1.2
    low: Colder = 0.8
    reach: Weight = 0.1

    def build(self) -> Algorithm:
        """Build the base with changed advantages."""
        base = self.base.build()
        names = {factor: f"logprob_at:{factor}" for factor in (self.high, self.low)}
        reads = requires("old_logprobs", "entropy", *names.values())
        change = steers_entropy(reads(partial(self.steer, names=names)))
        change = trait(TOKEN_TRANSFORM)(change)
        return replace(
            base,
            transforms=(*base.transforms, change),
            diagnostics=(*base.diagnostics, requires("entropy")(self.metrics)),
        )

    def steer(
        self, advantages: Tensor, batch: Batch, context: Context, *, names: Mapping[float, str]
    ) -> Tensor:
        """Mix the advantages with the weights of good tokens at the other temperature; [B, T]."""
        strength, factor = self.strength(batch)
        tempered = token_statistic(batch, names[factor])
        ratio = functional.probability_ratio(tempered, require_tensor(batch.old_logprobs, "old_logprobs"))
        good = (batch.returns > GOOD)[batch.trajectory][:, None] & batch.action_mask
        return (1 - strength) * advantages + strength * torch.where(good, ratio, 0.0)

    def strength(self, batch: Batch) -> tuple[float, float]:
        """Return a and the factor of T for a batch."""
        entropy = float(mean_entropy(batch))
        share = float((batch.returns > GOOD).double().mean()) if len(batch.returns) else 0.0
        size = min(abs(self.target - entropy), self.reach) / share if share else 0.0
        return size / (1 + size), self.high if entropy <= self.target else self.low

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return a, and H in nats."""
        return {
            "dcpo/strength": self.strength(rollout.batch)[0],
            "dcpo/entropy": float(mean_entropy(rollout.batch)),
        }


def mean_entropy(batch: Batch) -> Tensor:
    """Return the mean entropy of the action tokens before the update; a number, nats, 0 without any."""
    entropies = require_tensor(batch.old_entropies, "old_entropies").double()
    return functional.masked_mean(entropies, batch.action_mask)
