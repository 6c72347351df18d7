"""APPO: branches from decisive tokens, whose outcome is credit for the tokens before them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import decisions
from agentrl.algorithms.hooks import Context, MiniBatch, TokenHook, require_tensor, requires, trait
from agentrl.algorithms.influence_branching import InfluenceBranching, branch_credit, first_rollouts
from agentrl.algorithms.methods.grpo import GRPO, Estimate, mark_comparing
from agentrl.algorithms.recipe import Presets, recipe
from agentrl.config import Count, Tokens, Weight
from agentrl.data.batch import Batch

LARGE_RATIO = 6.0  # tokens with a negative advantage beyond it have a factor of at most 1
LOWEST_FACTOR = 0.8  # of those tokens


@recipe("appo")
@dataclass(frozen=True)
class APPO(GRPO):
    """Branches that share the tokens of a first rollout up to a decisive one, and the credit that they bring.

        A[t]  = A_first + mean of A_branch over the branches that share token t
        loss  = clipped surrogate of A (1 + influence f)
        f[t]  = clip(exp(sum over k >= t of 2^(-(k - t) / half_life) g[k]), 1, influence_high)
        g[k]  = log(pi / pi_old), or 0 where the ratio is above dual_clip

    First rollouts of a task are played to their end. Every other episode branches after one of their tokens,
    see `InfluenceBranching`: after tokens of high entropy whose future has become likelier for the learner
    than it was for the sampler. Returns are normalised, with the standard deviation of the population, among
    the first rollouts and among the branches. Branches are played for the credit of the tokens before them
    and are not learned from themselves. Where A < 0 and the ratio is above 6, f is in [0.8, 1]. Trajectories
    with more than one token beyond `dual_clip` leave the loss. Tokens are counted over a whole trajectory.

    The released code cannot be followed in four points. The learner's probabilities are those before the
    update: if the sampler is the learner, only rounding would tell them apart, which is left out, so that
    entropy alone decides. Its factor of the rewards is 1 where the reward is, so there is none here. At the
    first update, where all ratios are 1, f is 1 and the loss is (1 + influence) times that of GRPO. The
    product of two negative scores is positive and is no reason to branch.

    Also left out is that no branch follows white space. Entropies are exact, where the code takes the ten
    most likely tokens. Where too few tokens can be followed, the rest of the group are first rollouts.

        field             | paper      | released   | ours
        clip_high         | 0.28       | 0.28       | 0.28
        dual_clip         | 3.0        | 3.0        | 3.0
        aggregation       | sequence   | token      | sequence
        kl_coefficient    | 0.001      | 0.001      | 0.0
        drop_equal_groups | false      | false      | true
        weighting         | trajectory | trajectory | trajectory
        singleton         | zero       | raw        | zero

    The released scripts ran groups of 16, 8 of them first rollouts.

    Args:
        initial_rollouts: The number of first rollouts of a task: a number, or `half` of the group.
        influence: The weight of f; 0 leaves it out.
        half_life: The number of action tokens after which a later token counts half in f.
        influence_high: The upper limit of f.

    The remaining fields are those of `grpo`; two defaults differ.

    Source: arXiv:2606.12384.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"kl_coefficient": 1e-3},
        "released": {"kl_coefficient": 1e-3, "weighting": "trajectory"},
    }

    clip_high: Weight = 0.28
    dual_clip: Annotated[float, Interval(gt=1, le=1e7)] | None = 3.0
    initial_rollouts: Count | Literal["half"] = "half"
    influence: Weight = 1.0
    half_life: Tokens = 64
    influence_high: Annotated[float, Interval(ge=1, le=1e6)] = 1.2

    def build(self) -> Algorithm:
        """Build the algorithm."""
        plain = super().build()
        estimate = partial(
            functional.group_relative_advantage,
            divide_by_std=self.divide_by_std,
            singleton=self.singleton,
            ddof=0,
        )
        masks: tuple[TokenHook, ...] = (first_tokens,)
        weights: tuple[TokenHook, ...] = ()
        if self.dual_clip is not None:
            masks = (*masks, partial(without_outliers, limit=self.dual_clip))
        if self.influence:
            factor = partial(
                influence_factor,
                weight=self.influence,
                gamma=2 ** (-1 / self.half_life),
                high=self.influence_high,
                cap=self.dual_clip,
            )
            weights = (factor,)
        return replace(
            plain,
            rollout=replace(
                plain.rollout, branch_policy=partial(InfluenceBranching, initial=self.initial_rollouts)
            ),
            advantage=mark_comparing(partial(branched_advantage, estimate=estimate), self.singleton),
            masks=masks,
            weights=weights,
            terms=tuple(replace(term, where=first_tokens) for term in plain.terms),
            diagnostics=(*plain.diagnostics, partial(branch_metrics, estimate=estimate)),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.weighting == "row",
                "weighting is row, wanted trajectory: a branch is compared as a whole",
            ),
        ]


@trait("advantage within a turn")
def branched_advantage(batch: Batch, context: Context, *, estimate: Estimate) -> Tensor:
    """Return the advantage of first rollouts with the credit of their branches; [B, T], 0 on branches."""
    compared, first = _compared(batch, estimate)
    own = functional.broadcast_to_tokens(
        torch.where(first, compared, 0.0), batch.trajectory, batch.action_mask
    )
    return own + branch_credit(compared, batch)


def first_tokens(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the action tokens of first rollouts; [B, T] bool."""
    batch = mini.batch
    return batch.action_mask & first_rollouts(batch)[batch.trajectory][:, None]


@requires("current", "old_logprobs")
def without_outliers(mini: MiniBatch, context: Context, *, limit: float) -> Tensor:
    """Mark the tokens of trajectories with at most one bad token whose ratio is above `limit`; [B, T]."""
    batch = mini.batch
    beyond = (mini.advantages < 0) & (_log_ratio(mini) > math.log(limit)) & first_tokens(mini, context)
    counts = torch.zeros(len(batch.episodes), dtype=torch.int64, device=batch.tokens.device)
    counts = counts.index_add(0, batch.trajectory, beyond.sum(1))
    return batch.action_mask & (counts <= 1)[batch.trajectory][:, None]


@requires("current", "old_logprobs")
def influence_factor(
    mini: MiniBatch, context: Context, *, weight: float, gamma: float, high: float, cap: float | None
) -> Tensor:
    """Return 1 + weight * f, with f as `APPO` says; [B, T], 1 + weight where masked."""
    log_ratio = _log_ratio(mini)
    counted = log_ratio if cap is None else torch.where(log_ratio <= math.log(cap), log_ratio, 0.0)
    made = decisions(mini.batch)
    future = made.write(functional.future_ratio(made.read(counted.double()), made.valid, gamma=gamma))
    falling = (mini.advantages < 0) & (log_ratio > math.log(LARGE_RATIO))
    factor = torch.where(falling, future.clamp(LOWEST_FACTOR, 1.0), future.clamp(1.0, high))
    return 1 + weight * factor


def branch_metrics(mini: MiniBatch, context: Context, *, estimate: Estimate) -> Mapping[str, float]:
    """Measure the share of branches, and of the tokens of first rollouts that one shares, with its credit."""
    batch = mini.batch
    compared, first = _compared(batch, estimate)
    mask = first_tokens(mini, context)
    if not bool(mask.any()):
        return {}
    ones = branch_credit(torch.ones_like(compared), batch)
    return {
        "appo/branches": float((~first).double().mean()),
        "appo/shared": float(ones[mask].mean()),
        "appo/credit": float(branch_credit(compared, batch)[mask].abs().mean()),
    }


def _compared(batch: Batch, estimate: Estimate) -> tuple[Tensor, Tensor]:
    """Return the advantage of each trajectory among those of its kind, and whether it is a first rollout."""
    first = first_rollouts(batch)
    return estimate(batch.returns, 2 * batch.groups + first), first


def _log_ratio(mini: MiniBatch) -> Tensor:
    """Return the log of the ratio of each action token, 0 elsewhere; [B, T] nats."""
    old = require_tensor(mini.batch.old_logprobs, "old_logprobs")
    return torch.where(mini.batch.action_mask, mini.now.logprobs - old, 0.0)
