"""CISPO: the ratio is a clipped weight of the log-probability, so that no token loses its gradient."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_plain, fixed_clip
from agentrl.algorithms.hooks import Bounds, MiniBatch, Outputs, excludes, require_tensor
from agentrl.algorithms.importance import sampler_ratio
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, Weight


@recipe("cispo")
@dataclass(frozen=True)
class CISPO(Recipe):
    """Clipped importance-sampling policy optimisation: a clipped ratio weighs the log-probability.

        loss = mean of -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A log pi

    where sg stops the gradient. A token outside the bounds keeps its gradient, at the weight of the bound.
    With bounds that no ratio reaches, it has the gradient of its base without a clip.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.aggregation    | token | token    | sequence
        base.kl_coefficient | 0.0   | 0.0      | 0.0
        clip_high           | 0.28  | 4.0      | 0.28

    The authors released no code that we know. `released` is SkyRL; ARL-Arena has clip_high 0.2. The paper's
    upper bound is not known to us. Another loss of SkyRL, which drops the tokens outside the bounds, has
    another gradient, although its comment says that it is this one.

    Args:
        base: The recipe that provides the advantage, selection, rewards and terms.
        clip_low: The weight is at least 1 - clip_low; 1 leaves it without a lower bound.
        clip_high: The weight is at most 1 + clip_high.
        anchor: The probability that ratios are relative to: the learner's before the update (`old`), or that
            at which the engine sampled (`sampler`), which corrects their mismatch as well.

    Source: MiniMax 2025, arXiv:2506.13585.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0, "aggregation": "token"}},
        "released": {"base": {"name": "grpo", "preset": "released"}, "clip_high": 4.0},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    clip_low: Share = 1.0
    clip_high: Weight = 0.28
    anchor: Literal["old", "sampler"] = "old"

    def build(self) -> Algorithm:
        """Build the base with the weighted log-probability as its loss."""
        base = build_plain(self.base, self.name)
        return replace(
            base,
            ratio=sampler_ratio if self.anchor == "sampler" else base.ratio,
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=None),
            surrogate=weighted_logprob,
        )


@excludes(
    sequence_ratio="its weight is that of a single token",
    adaptive_bounds="they are found for a loss that drops the tokens outside, and this one keeps them",
)
def weighted_logprob(outputs: Outputs, mini: MiniBatch, bounds: Bounds | None) -> Tensor:
    """Return -A log pi times the clipped ratio, which has no gradient; [B, T]."""
    weight = require_tensor(outputs.ratio, "ratio").detach()
    if bounds is not None:
        weight = weight.clamp(min=bounds.lower).clamp(max=bounds.upper)
    return -weight * mini.advantages * outputs.logprobs
