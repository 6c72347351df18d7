"""REINFORCE++: discounted returns of every token, whitened over the batch."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.features import at_last_decisions, decision_rewards, decisions, row_scores
from agentrl.algorithms.hooks import Advantage, Context, require_tensor, requires, trait
from agentrl.algorithms.methods.grpo import GRPO, Weighting, compare_in_groups, mark_comparing
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch


@recipe("reinforce_pp")
@dataclass(frozen=True)
class ReinforcePlusPlus(ClippedRecipe):
    """REINFORCE++: the discounted return from each token on, normalised over the batch.

        A[t] = whiten(r[t] + gamma r[t + 1] + gamma^2 r[t + 2] + ...),   over the action tokens of the batch

    With `baseline` it is REINFORCE++-baseline: the mean return of the group is subtracted from the return of
    the trajectory, and all tokens of the trajectory share the result.

        field             | paper      | released | ours
        dual_clip         | null       | 3.0      | null
        aggregation       | token      | token    | token
        drop_equal_groups | false      | false    | false
        weighting         | trajectory | row      | trajectory
        singleton         | zero       | raw      | zero

    The paper's divergence penalty differs between its experiments; the default has none. The released code is
    verl-agent.

    Args:
        gamma: The discount from one action token to the next.
        baseline: Whether to compare returns within groups, instead of the returns of tokens over the batch.
        weighting: `row` treats every turn as an episode of its own that ends with the return of the whole
            episode.
        singleton: As in `grpo`, for `baseline`.
        reward_kl_coefficient: The coefficient of the divergence from the initial policy, subtracted from the
            rewards token by token; `kl_coefficient` adds it to the loss instead.

    The remaining fields are those of `ClippedRecipe`; two defaults differ.

    Source: Hu et al. 2025, arXiv:2501.03262.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {"released": {"weighting": "row", "singleton": "raw"}}
    OFFICIAL: ClassVar[Collection[str]] = GRPO.OFFICIAL

    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "token"
    drop_equal_groups: bool = False
    gamma: Share = 1.0
    baseline: bool = False
    weighting: Weighting = "trajectory"
    singleton: functional.Singleton = "zero"
    reward_kl_coefficient: Weight = 0.0

    def build(self) -> Algorithm:
        """Build the algorithm."""
        return replace(super().build(), advantage=self._advantage())

    def _advantage(self) -> Advantage:
        if self.baseline:
            estimate = partial(
                functional.group_relative_advantage, divide_by_std=False, singleton=self.singleton
            )
            compared = partial(
                whitened_comparison,
                estimate=estimate,
                weighting=self.weighting,
                invalid_penalty=self.invalid_penalty,
            )
            return mark_comparing(compared, self.singleton)
        returns = partial(
            whitened_returns,
            gamma=self.gamma,
            weighting=self.weighting,
            invalid_penalty=self.invalid_penalty,
        )
        if self.reward_kl_coefficient:
            return partial(returns_less_divergence, returns=returns, coefficient=self.reward_kl_coefficient)
        return returns if self.gamma == 1 else trait("advantage within a turn")(returns)

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.baseline and (self.gamma != 1 or self.reward_kl_coefficient != 0),
                "baseline compares whole returns, wanted neither gamma nor reward_kl_coefficient with it",
            ),
        ]


def whitened_comparison(batch: Batch, context: Context, **settings: Any) -> Tensor:
    """Return `compare_in_groups`, whitened over all action tokens; [B, T]."""
    return functional.whiten(compare_in_groups(batch, context, **settings), batch.action_mask)


def whitened_returns(
    batch: Batch,
    context: Context,
    *,
    gamma: float,
    weighting: Weighting,
    invalid_penalty: float,
    cost: Tensor | float = 0.0,
) -> Tensor:
    """Return the discounted return from each action token on, whitened over all of them; [B, T].

    `cost`, a number or [B, T], is subtracted from the reward of every action token.
    """
    made = decisions(batch)
    if weighting == "row":
        rewards, restart = at_last_decisions(row_scores(batch, invalid_penalty), made), made.last
    else:
        rewards, restart = decision_rewards(batch), None
    returns = functional.discounted_returns(
        made.read(rewards - cost), made.valid, gamma=gamma, restart=restart
    )
    return functional.whiten(made.write(returns), batch.action_mask)


@trait("advantage within a turn")
@requires("old_logprobs", "reference")
def returns_less_divergence(
    batch: Batch, context: Context, *, returns: Callable[..., Tensor], coefficient: float
) -> Tensor:
    """Return `returns` with the divergence from the reference policy subtracted from the rewards; [B, T]."""
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    divergence = functional.kl_k1(old, require_tensor(batch.reference_logprobs, "reference"))
    return returns(batch, context, cost=coefficient * divergence)
