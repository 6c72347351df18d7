"""T1: leave-one-out advantages with a centred divergence, a bonus of entropy, and a price of overflow."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import entropy_bonus
from agentrl.algorithms.features import decisions
from agentrl.algorithms.hooks import Context, Term, require_tensor, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import SignedWeight, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Episode, StopReason


@recipe("t1")
@dataclass(frozen=True)
class T1(Recipe):
    """T1: leave-one-out advantages of reward and divergence, with an entropy bonus for wide sampling.

        A    = R - mean of the others' R - kl_coefficient * (k - mean of the others' k)
        k    = sum over the action tokens of an episode of log pi_old - log pi_reference
        loss = that of the base - entropy_coefficient * mean of H over the action tokens

    An episode with a reply that was cut at the limit of its length, or that left the context, has the reward
    `overflow_reward`. With coefficients of 0 and no such episodes it is its base.

        field               | paper  | released | ours
        base.name           | rloo   | rloo     | rloo
        base.preset         | paper  | paper    | ours
        entropy_coefficient | 0.001  | 0.001    | 0.001
        kl_coefficient      | 0.0002 | 0.0002   | 0.0

    This is a reconstruction from two summaries of the paper; it has no released code. The entropy coefficient
    is ours, since none was found. The paper's groups are of 64 at a temperature of 1.2; its penalty of
    repetition and its reference, a moving average of the policy, are not reproduced.

    Args:
        base: The recipe that provides the advantage of the reward.
        entropy_coefficient: The coefficient of the bonus, in loss units per nat.
        kl_coefficient: The weight of the divergence in the advantage, in reward units per nat.
        overflow_reward: The reward of an episode that overflowed.

    Source: Hou et al. 2025, arXiv:2501.11651.
    """

    KIND = "exploration"
    CONFIDENCE = "reconstruction"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "rloo", "preset": "paper"}, "entropy_coefficient": 0.001}
        | {"kl_coefficient": 0.0002}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("rloo"))
    entropy_coefficient: SignedWeight = 0.001
    kl_coefficient: Weight = 0.0
    overflow_reward: SignedWeight = -1.0

    def build(self) -> Algorithm:
        """Build the base with divergence, bonus and price."""
        base = self.base.build()
        terms, transforms = base.terms, base.transforms
        if self.entropy_coefficient:
            weights = functional.token_weights
            terms = (*terms, Term("t1_entropy", entropy_bonus, -self.entropy_coefficient, weights))
        if self.kl_coefficient:
            transforms = (*transforms, partial(subtract_divergence, coefficient=self.kl_coefficient))
        priced = partial(price_overflow, reward=self.overflow_reward)
        return replace(base, shape_reward=(*base.shape_reward, priced), transforms=transforms, terms=terms)


@requires("reference", "old_logprobs")
def subtract_divergence(advantages: Tensor, batch: Batch, context: Context, *, coefficient: float) -> Tensor:
    """Subtract the divergence of an episode, less the mean of the others of its group; [B, T] float64."""
    old = require_tensor(batch.old_logprobs, "old_logprobs").double()
    gap = functional.kl_k1(old, require_tensor(batch.reference_logprobs, "reference_logprobs"))
    totals = decisions(batch).read(gap).sum(dim=1)
    centred = functional.leave_one_out_advantage(totals, batch.groups)
    spread = functional.broadcast_to_tokens(centred, batch.trajectory, batch.action_mask)
    return advantages.double() - coefficient * spread


def price_overflow(episode: Episode, context: Context, *, reward: float) -> Sequence[float]:
    """Return the rewards, or `reward` in all if a reply was cut or the episode left the context."""
    rewards = [turn.reward for turn in episode.turns]
    cut = any(turn.finish == "length" for turn in episode.turns)
    if rewards and (cut or episode.stop is StopReason.CONTEXT_LIMIT):
        return [*[0.0] * (len(rewards) - 1), reward]
    return rewards
