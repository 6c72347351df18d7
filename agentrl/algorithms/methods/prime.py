"""PRIME: a reward of every token from a reward model that is trained on the outcomes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import ClippedRecipe
from agentrl.algorithms.features import at_last_decisions, decisions, has_decision
from agentrl.algorithms.hooks import COMPARES, Context, Select, require_tensor, requires, trait
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.algorithms.reward_model import RewardModel, outcome_loss, outcome_metrics, token_gaps
from agentrl.config import PositiveRate, PositiveWeight, Share, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Group, StopReason

Unit = Literal["token", "turn"]
_PUBLISHED = {"entropy_coefficient": 0.001, "max_rounds": 4, "reward_learning_rate": 1e-6}


@recipe("prime")
@dataclass(frozen=True)
class PRIME(ClippedRecipe):
    """Process reinforcement through implicit rewards: a reward model that began as the policy scores tokens.

        r[t]  = beta (log phi[t] - log ref[t]),   0 at the last action token;   divided by max |return| if
                `normalise`
        A     = whiten(outcome_coefficient * A_out + process_coefficient * sum of A_pro from t on)
        A_out = R - mean R of the others;   A_pro[t] = n / (n - 1) r[t] - sum of mean r / (n - 1)
        phi descends  mean of BCE(sigmoid(beta sum of (log phi - log ref)), success)

    phi and ref are copies of the policy before its training; ref is frozen, and phi takes one step of AdamW
    per rollout batch, before it gives the rewards. n counts the episodes of the group. With a
    process_coefficient of 0 and without whitening it is RLOO, times outcome_coefficient.

        field                | paper | released | ours
        dual_clip            | null  | 3.0      | null
        aggregation          | token | token    | token
        drop_equal_groups    | false | false    | false
        entropy_coefficient  | 0.001 | 0.001    | 0.0
        max_rounds           | 4     | 4        | 1
        reward_learning_rate | 1e-06 | 1e-06    | 0.0001

    The published runs used groups of 4 and a policy learning rate of 5e-7. They draw four times the tasks at
    once and prefer those of the wanted accuracy; here tasks are drawn in up to `max_rounds` rounds until
    enough have it, and the last round fills up. As failures of agents often end at the limit of turns, only
    an episode that left the context, or a reply that was cut, counts as truncated. Not reproduced: the
    divergence in the reward, which the scripts weigh by 0.001, and the accumulation with a lambda.

    Args:
        process_coefficient: The weight of the process rewards; 0 trains no reward model.
        outcome_coefficient: The weight of the returns.
        beta: The reward of a nat.
        unit: What gets a process reward: a `token`, or the sum of its tokens at the end of a `turn`.
        normalise: Whether to divide process rewards by the largest return of the batch.
        whiten: Whether to normalise the advantages over the action tokens of the batch.
        accuracy: The share of successes that a group may have to be learned from, and no episode of it may be
            truncated; null keeps all groups.
        max_rounds: The maximum number of rounds in which tasks are drawn until enough groups are kept.
        reward_learning_rate: The learning rate of the reward model.
        reward_clip_gradient: The largest norm of its gradient.

    The remaining fields are those of `ClippedRecipe`; two defaults differ.

    Source: Cui et al. 2025, arXiv:2502.01456.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {"paper": _PUBLISHED, "released": _PUBLISHED}

    aggregation: Literal["token", "sequence", "trajectory", "constant"] = "token"
    drop_equal_groups: bool = False
    process_coefficient: Weight = 5.0
    outcome_coefficient: Weight = 5.0
    beta: PositiveWeight = 0.05
    unit: Unit = "token"
    normalise: bool = True
    whiten: bool = True
    accuracy: tuple[Share, Share] | None = (0.2, 0.8)
    max_rounds: Annotated[int, Interval(ge=1, le=1000)] = 1
    reward_learning_rate: PositiveRate = 1e-4
    reward_clip_gradient: PositiveRate = 10.0

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        select, advantage = plain.select, partial(prime_advantage, recipe=self)
        if self.accuracy is not None:
            select = partial(keep_accurate, accuracy=self.accuracy, select=select)
        built = replace(
            plain,
            select=select,
            rollout=replace(plain.rollout, rounds=self.max_rounds),
            advantage=trait(COMPARES)(advantage),
        )
        if not self.process_coefficient:
            return built
        loss = partial(outcome_loss, beta=self.beta)
        return replace(
            built,
            reward_model=RewardModel(loss, self.reward_learning_rate, self.reward_clip_gradient),
            advantage=trait("advantage within a turn")(
                requires("reward_model", "reference")(built.advantage)
            ),
            diagnostics=(*built.diagnostics, partial(outcome_metrics, beta=self.beta)),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        low, high = self.accuracy or (0.0, 1.0)
        return [
            *super()._contradictions(),
            (low > high, f"accuracy is {[low, high]}, wanted the lower bound first"),
            (
                self.max_rounds > 1 and self.accuracy is None,
                f"max_rounds is {self.max_rounds}, and accuracy=null keeps all groups, wanted max_rounds=1",
            ),
        ]


def prime_advantage(batch: Batch, context: Context, *, recipe: PRIME) -> Tensor:
    """Add the advantages of outcomes and of process rewards; [B, T] float64."""
    outcome = functional.leave_one_out_advantage(batch.returns, batch.groups)
    spread = functional.broadcast_to_tokens(outcome, batch.trajectory, batch.action_mask)
    advantages = recipe.outcome_coefficient * spread
    if recipe.process_coefficient:
        advantages = advantages + recipe.process_coefficient * process_advantage(batch, recipe)
    return functional.whiten(advantages, batch.action_mask) if recipe.whiten else advantages


def process_advantage(batch: Batch, recipe: PRIME) -> Tensor:
    """Sum the process rewards from each action token on, each less those of the others; [B, T] float64."""
    made = decisions(batch)
    gaps = made.read(token_gaps(batch, require_tensor(batch.reward_logprobs, "reward_model")))
    rewards, counted = functional.implicit_rewards(gaps, made.valid, beta=recipe.beta), made.valid
    if recipe.unit == "turn":
        sums = torch.zeros(has_decision(batch).shape, dtype=rewards.dtype, device=rewards.device)
        sums.scatter_add_(1, made.turns.clamp(min=0), rewards)
        rewards, counted = made.read(at_last_decisions(sums, made)), made.last
    if recipe.normalise:
        rewards = functional.over_largest_return(rewards, counted)
    compared = functional.leave_one_out_rewards(rewards, counted, batch.groups)
    return made.write(functional.discounted_returns(compared, made.valid, gamma=1.0))


def keep_accurate(
    groups: Sequence[Group], context: Context, *, accuracy: tuple[float, float], select: Select
) -> Sequence[Group]:
    """Keep the groups of the wanted share of successes without a truncated episode, then select again."""
    low, high = accuracy
    kept = []
    for group in groups:
        wins = sum(episode.success for episode in group.finished)
        cut = any(
            episode.stop is StopReason.CONTEXT_LIMIT or any(turn.finish == "length" for turn in episode.turns)
            for episode in group.finished
        )
        share = wins / max(1, len(group.finished))
        if group.finished and not cut and low <= share <= high:
            kept.append(group)
    return select(kept, context)
