"""Light-IF: a bonus of entropy where it would fall, and cloning where the policy is surely wrong."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import entropy_bonus
from agentrl.algorithms.features import decisions, highest_tokens, share_of
from agentrl.algorithms.hooks import Context, MiniBatch, Term, require_tensor, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, PositiveWeight, Weight


@recipe("light_if")
@dataclass(frozen=True)
class LightIF(Recipe):
    """Token-wise entropy-adaptive regularisation (TEA-RL): entropy is held up where an update lowers it.

        a    = clip(scale * softmax of cov over the trajectory, 0, limit),   without gradient
        loss = that of the base - coefficient * mean of a H over the action tokens

    cov is the token's part in the covariance of advantage and log-probability, see `kl_cov`. As the softmax
    sums to 1, a token of a long trajectory has little. With coefficient 0 it is its base.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0
        coefficient         | 1.0   | 0.0      | 1.0

    In the released code the term is overwritten before it is used, and so has no effect, as `released` has;
    there cov keeps a gradient and is that of a micro-batch.

    Args:
        base: The recipe whose loss this adds to.
        coefficient: The coefficient of the bonus, in loss units per nat.
        scale: The factor of the softmax.
        limit: The highest weight of a token.

    Source: Wang et al. 2025, arXiv:2508.03178.
    """

    KIND = "entropy"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released"}, "coefficient": 0.0},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    coefficient: Weight = 1.0
    scale: PositiveWeight = 10.0
    limit: PositiveWeight = 5.0

    def build(self) -> Algorithm:
        """Build the base with the bonus."""
        base = self.base.build()
        if not self.coefficient:
            return base
        where = partial(adaptive_weights, scale=self.scale, limit=self.limit)
        bonus = Term("tea_entropy", entropy_bonus, -self.coefficient, functional.token_weights, where)
        return replace(base, terms=(*base.terms, bonus))


@requires("covariance")
def adaptive_weights(mini: MiniBatch, context: Context, *, scale: float, limit: float) -> Tensor:
    """Return the weight of each token's entropy; [B, T] float64."""
    made = decisions(mini.batch)
    values = torch.where(made.valid, made.read(feature_of(mini, "covariance")), -torch.inf)
    some = made.valid.any(dim=1, keepdim=True)
    shares = torch.where(some, values, 0.0).softmax(dim=1)
    return made.write((scale * shares).clamp(0, limit))


@recipe("entropy_sft")
@dataclass(frozen=True)
class EntropySFT(Recipe):
    """Entropy-preserving supervised fine-tuning: imitate the tokens of which the policy is surely wrong.

        d    = -log pi - weight * H,   before the update
        loss = that of the base over the max(1, floor(share * action tokens)) tokens of highest d

    Tokens of high entropy are left as they are. With share 1 it is its base.

        field       | paper             | released          | ours
        base.name   | behaviour_cloning | behaviour_cloning | behaviour_cloning
        base.preset | ours              | ours              | ours
        share       | 0.2               | 0.2               | 0.2
        weight      | 1.0               | 1.0               | 1.0

    The values are those of the released code.

    Args:
        base: The recipe whose loss is masked.
        share: The share of the action tokens that are imitated.
        weight: The weight of the entropy.

    Source: Wang et al. 2025, arXiv:2508.03178.
    """

    KIND = "imitation"
    CONFIDENCE = "official code read"

    base: Base = field(default_factory=lambda: build_recipe("behaviour_cloning"))
    share: PositiveShare = 0.2
    weight: Weight = 1.0

    def build(self) -> Algorithm:
        """Build the base with the mask."""
        base = self.base.build()
        chosen = partial(surely_wrong, share=self.share, weight=self.weight)
        return replace(base, masks=(*base.masks, chosen))


@requires("entropy", "old_logprobs")
def surely_wrong(mini: MiniBatch, context: Context, *, share: float, weight: float) -> Tensor:
    """Mark the tokens of low probability for their entropy; [B, T] bool."""
    batch, mask = mini.batch, mini.batch.action_mask
    surprise = -require_tensor(batch.old_logprobs, "old_logprobs")
    values = surprise - weight * require_tensor(batch.old_entropies, "old_entropies")
    return highest_tokens(values, mask, share_of(int(mask.sum()), share), batch)
