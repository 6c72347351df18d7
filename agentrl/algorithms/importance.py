"""Mismatch between the policy that sampled the action tokens and the learner, and its correction."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.functional.aggregation import sequence_members
from agentrl.algorithms.hooks import (
    Context,
    MiniBatch,
    Outputs,
    excludes,
    require_tensor,
    requires,
    trait,
    traits,
)
from agentrl.data.batch import Batch

Level = Literal["token", "turn", "trajectory"]  # whose importance it is
Measure = Literal["ratio", "geometric", "k3", "each"]

SAMPLER_RATIO = "sampler ratio"  # a trait: ratios are relative to the policy that sampled
IMPORTANCE_WEIGHTS = "importance weights"  # a trait: it weighs or drops tokens by their importance


def with_importance_correction(
    algorithm: Algorithm, cap: float | None, *, default: float | None = None
) -> Algorithm:
    """Return an algorithm that weights its action tokens by importance.

    Args:
        algorithm: Any algorithm.
        cap: The upper limit of the weights, see `truncated_importance`; None takes the default.
        default: The limit where none is given, unless the algorithm corrects the mismatch itself; None adds
            no weights.

    Raises:
        ConfigError: If a limit is given for an algorithm that corrects the mismatch itself.
    """
    if cap is None and not corrects_mismatch(algorithm):
        cap = default
    if cap is None:
        return algorithm
    return replace(
        algorithm,
        weights=(*algorithm.weights, partial(importance_weights, cap=cap)),
        diagnostics=(*algorithm.diagnostics, partial(capped_share, cap=cap)),
    )


def corrects_mismatch(algorithm: Algorithm) -> bool:
    """Return whether an algorithm corrects the mismatch itself."""
    return any(
        traits(component) & {SAMPLER_RATIO, IMPORTANCE_WEIGHTS} for _, component in algorithm.components()
    )


@trait(SAMPLER_RATIO)
def sampler_ratio(outputs: Outputs, mini: MiniBatch) -> Tensor:
    """Return the new probability of each token over the one it was sampled with; [B, T]."""
    return functional.probability_ratio(outputs.logprobs, mini.batch.logprobs)


@requires("old_logprobs")
@trait(IMPORTANCE_WEIGHTS)
@excludes(
    sampler_ratio="the ratio to the sampler is the importance already, wanted trainer.importance_cap=null",
    importance_weights="the method weighs by importance itself, wanted trainer.importance_cap=null",
)
def importance_weights(mini: MiniBatch, context: Context, *, cap: float) -> Tensor:
    """Return the truncated importance of each action token, 1 elsewhere; [B, T].

    See `functional.truncated_importance`.
    """
    batch = mini.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    weights = functional.truncated_importance(old, batch.logprobs, cap)
    return torch.where(batch.action_mask, weights, 1.0)


@requires("old_logprobs")
def capped_share(rollout: MiniBatch, context: Context, *, cap: float) -> Mapping[str, float]:
    """Measure the share of action tokens whose importance weight the cap limits: mismatch/capped."""
    batch = rollout.batch
    old = require_tensor(batch.old_logprobs, "old_logprobs")[batch.action_mask]
    if not len(old):
        return {}
    return {"mismatch/capped": float(((old - batch.logprobs[batch.action_mask]).exp() > cap).float().mean())}


def log_importance(batch: Batch) -> Tensor:
    """Return log pi_old - log pi_sampler of each action token, in +-20, 0 elsewhere; [B, T] float64, nats."""
    old = require_tensor(batch.old_logprobs, "old_logprobs")
    return torch.where(batch.action_mask, (old.double() - batch.logprobs.double()).clamp(-20, 20), 0.0)


def importance_measure(batch: Batch, *, level: Level, by: Measure) -> Tensor:
    """Return the `ratio`, `geometric` mean or mean `k3` of the sequence of each action token; [B, T].

    Elsewhere it is 1. The logarithm of a ratio is within [-20, 20].
    """
    gap = log_importance(batch)
    values = gap.exp() - 1 - gap if by == "k3" else gap
    if level != "token":
        mask = batch.action_mask
        member, count = sequence_members(mask, batch.turns, batch.trajectory, level)
        sums = gap.new_zeros(count).index_add(0, member[mask], values[mask])
        if by != "ratio":
            sums = sums / torch.bincount(member[mask], minlength=count).clamp(min=1)
        values = torch.where(mask, sums[member], 0.0)
    return values if by == "k3" else values.clamp(-20, 20).exp()


def importance_within(batch: Batch, *, level: Level, by: Measure, low: float, high: float) -> Tensor:
    """Mark the action tokens of sequences whose measure is within the bounds; [B, T] bool."""
    mask = batch.action_mask
    if by != "each":
        found = importance_measure(batch, level=level, by=by)
        return mask & (found >= low) & (found <= high)
    single = log_importance(batch).exp()
    outside = mask & ~((single >= low) & (single <= high))
    if level == "token":
        return mask & ~outside
    member, count = sequence_members(mask, batch.turns, batch.trajectory, level)
    return mask & (torch.bincount(member[outside], minlength=count) == 0)[member]
