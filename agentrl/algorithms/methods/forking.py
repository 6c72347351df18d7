"""Forking tokens: the policy loss of the tokens of highest entropy alone."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, require_tensor, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare


@recipe("forking")
@dataclass(frozen=True)
class Forking(Recipe):
    """Forking tokens (beyond 80/20): only the action tokens of highest entropy are learned from.

        tau = the entropy of the token at rank max(1, round(share * action tokens)) of the mini-batch
        the surrogate is that of the base over the tokens with H >= tau, whose number is the normaliser

    H is the entropy before the update. Ties at tau are all kept. With share 1 it is its base.

        field               | paper | released | ours
        base.name           | dapo  | dapo     | grpo
        base.preset         | paper | paper    | ours
        share               | 0.2   | 0.2      | 0.2

    There is no released code of the authors; `released` is the method as in the code of Lp-Reg and SIREN,
    which take the threshold of a micro-batch. In the paper the 80th percentile of an 8B model is 0.672 nats.

    Args:
        base: The recipe whose surrogate is masked.
        share: The share of the action tokens that are kept.

    Source: Wang et al. 2025, arXiv:2506.01939.
    """

    KIND = "token selection"
    CONFIDENCE = "paper read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "dapo", "preset": "paper"}},
        "released": {"base": {"name": "dapo", "preset": "paper"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    share: PositiveShare = 0.2

    def build(self) -> Algorithm:
        """Build the base with the mask."""
        base = self.base.build()
        return replace(base, masks=(*base.masks, partial(highest_entropy, share=self.share)))


@requires("entropy")
def highest_entropy(mini: MiniBatch, context: Context, *, share: float) -> Tensor:
    """Mark the share of the action tokens with the highest entropy before the update; [B, T] bool."""
    mask = mini.batch.action_mask
    # Rounded, so that ties do not depend on floating-point noise.
    entropies = require_tensor(mini.batch.old_entropies, "old_entropies").double().round(decimals=9)
    values = entropies[mask].sort(descending=True).values
    if not len(values):
        return torch.zeros_like(mask)
    return mask & (entropies >= values[max(1, round(share * len(values))) - 1])
