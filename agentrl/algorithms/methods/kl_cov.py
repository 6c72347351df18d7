"""KL-Cov: a divergence penalty on the tokens that reduce the entropy most."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_plain
from agentrl.algorithms.features import highest_tokens, share_of
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, require_tensor, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, Weight


@recipe("kl_cov")
@dataclass(frozen=True)
class KLCov(Recipe):
    """KL-Cov: nothing is clipped, and a few tokens of high covariance are held near the old policy.

        cov  = (A - mean A) (log pi - mean log pi),   means over the action tokens of the mini-batch
        loss = mean of -A ratio + coefficient [cov among the highest] |log pi - log pi_old|

    The highest are max(1, floor(share * action tokens)) tokens in the surrogate; ties go to the earlier
    trajectory, turn and token. In the first update on a batch the policy is the old one, and the penalty has
    no gradient. With coefficient 0 it is its base without a clip.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.aggregation    | token | token    | sequence
        base.kl_coefficient | 0.0   | 0.0      | 0.0

    The share is the one published for 7B; 32B has 0.0002. What the paper calls KL is, in its code, the
    absolute logarithm of the ratio. Statistics are those of a micro-batch there.

    Args:
        base: The recipe that provides the advantage, selection, rewards and other terms.
        share: The share of the action tokens that are penalised.
        coefficient: The coefficient of the penalty, in loss units per nat.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """

    KIND = "token selection"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0, "aggregation": "token"}},
        "released": {"base": {"name": "grpo", "preset": "released"}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    share: PositiveShare = 0.002
    coefficient: Weight = 1.0

    def build(self) -> Algorithm:
        """Build the base with the penalty in place of its clip."""
        base = build_plain(self.base, self.name)
        where = partial(highest_covariance, share=self.share)
        term = Term("kl_cov", absolute_log_ratio, self.coefficient, where=where)
        return replace(base, clip=None, terms=(*base.terms, term))


@requires("old_logprobs")
def absolute_log_ratio(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    """Return |log pi - log pi_old| of every token; [B, T] nats, with gradient 0 where they are equal."""
    return functional.kl_k1(outputs.logprobs, require_tensor(mini.batch.old_logprobs, "old_logprobs")).abs()


@requires("covariance")
def highest_covariance(mini: MiniBatch, context: Context, *, share: float) -> Tensor:
    """Mark the tokens in the surrogate with the highest covariance of advantage and logprob; [B, T] bool."""
    counted = mini.counted
    count = share_of(int(counted.sum()), share)
    return highest_tokens(feature_of(mini, "covariance"), counted, count, mini.batch)
