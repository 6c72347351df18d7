"""GSPO: one ratio per turn instead of one per token."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_clipped, fixed_clip
from agentrl.algorithms.hooks import MiniBatch, Outputs, require_tensor, trait
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, Weight


@recipe("gspo")
@dataclass(frozen=True)
class GSPO(Recipe):
    """Group sequence policy optimisation: a turn's tokens share one ratio, and are clipped together.

        ratio = exp( mean over the turn of log pi(token) - log pi_old(token) )
        loss  = mean over turns of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    In a dialogue, a sequence is one turn, in both layouts of a batch. The loss is the mean over the action
    tokens of a turn, then over turns. There is no dual clip.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0

    All bounds are the published ones; for short replies ARL-Arena has 0.03 and 0.04. The released code is
    verl-agent.

    Args:
        base: The recipe that provides the advantage, selection, rewards and terms.
        clip_low: The ratio of a turn, a geometric mean over its action tokens, is clipped below 1 - clip_low.
        clip_high: The ratio of a turn is clipped above 1 + clip_high.

    Source: Zheng et al. 2025, arXiv:2507.18071.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    clip_low: Share = 3e-4
    clip_high: Weight = 4e-4

    def build(self) -> Algorithm:
        """Build the base with one ratio per turn."""
        base, _ = build_clipped(self.base, self.name)
        return replace(
            base,
            ratio=turn_ratio,
            clip=partial(fixed_clip, low=self.clip_low, high=self.clip_high, dual=None),
            aggregation=partial(functional.sequence_weights, sequence="turn"),
        )


@trait("sequence ratio")
def turn_ratio(outputs: Outputs, mini: MiniBatch) -> Tensor:
    """Return the new over the old probability of each turn, at all its action tokens; [B, T]."""
    batch = mini.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    return functional.sequence_ratio(outputs.logprobs, old, batch.action_mask, batch.turns, batch.trajectory)
