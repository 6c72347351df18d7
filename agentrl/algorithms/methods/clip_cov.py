"""Covariance clipping: a few of the decisions that cost the policy most of its entropy are left out."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from heapq import nsmallest

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, clipped_tokens
from agentrl.algorithms.hooks import Bounds, Clip, Context, MiniBatch, require_tensor, requires
from agentrl.config import SignedWeight
from agentrl.errors import RequirementError
from agentrl.seeds import derive_seed

Band = tuple[SignedWeight, SignedWeight]


def with_covariance_clip(algorithm: Algorithm, share: float, band: Band) -> Algorithm:
    """Have an algorithm's surrogate clip by covariance, which takes the place of its dual clip.

    Args:
        algorithm: any; what counts and what is clipped already is read from the mini-batch, so that it is
            that of the loss in the end.
        share: of the decisions, see `covariance_clip`; 0 gives the algorithm itself.
        band: likewise.
    """
    if not share:
        return algorithm
    return replace(
        algorithm,
        clip=None if algorithm.clip is None else partial(without_dual, clip=algorithm.clip),
        weights=(*algorithm.weights, partial(covariance_clip, share=share, band=band)),
        diagnostics=(*algorithm.diagnostics, partial(covariance_metrics, share=share, band=band)),
    )


@requires("current")
def covariance_clip(mini: MiniBatch, context: Context, *, share: float, band: Band) -> Tensor:
    """Weigh a few decisions with 0 and all others with 1.

        cov = (A - mean A) * (logprob - mean logprob),   means over the decisions of the mini-batch

    The decisions are those in the mask of the mini-batch. Among those with band[0] < cov < band[1] that its
    bounds do not hold back, max(1, floor(share * decisions)) are drawn, each with the same chance, or all if
    they are fewer. The draw depends on the seed, the step, and the decision's episode, turn and position in
    its sequence.

    Args:
        mini: with what the policy says now, its ratio, the mask and the bounds.
        context: for the seed and the step.
        share: of the decisions, within (0, 1].
        band: in nats times the unit of the advantages, which is that of rewards unless they are divided by a
            deviation.

    Returns:
        [B, T] float. The normaliser of the loss is not touched: a weight of 0 leaves a gap.

    Raises:
        RequirementError: if `mini.current` is empty.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """
    current, batch = mini.current, mini.batch
    if current is None:
        raise RequirementError("MiniBatch.current is empty; covariance clipping reads it")
    counted = mini.counted
    covariance = functional.covariance(mini.advantages, current.logprobs, counted)
    candidates = counted & (band[0] < covariance) & (covariance < band[1]) & ~clipped_tokens(mini, current)
    rows, positions = candidates.nonzero(as_tuple=True)
    turns = batch.turns[rows, positions].tolist()
    names = [batch.episodes[owner].id for owner in batch.trajectory[rows].tolist()]
    places = list(zip(names, turns, positions.tolist(), strict=True))

    def draw(index: int) -> tuple[int, tuple[str, int, int]]:
        place = places[index]
        return derive_seed("covariance", context.seed, context.step, *place), place

    chosen = nsmallest(_count(share, counted), range(len(places)), key=draw)
    weights = torch.ones_like(mini.advantages)
    weights[rows[chosen], positions[chosen]] = 0.0
    return weights


@requires("old_logprobs")
def covariance_metrics(
    rollout: MiniBatch, context: Context, *, share: float, band: Band
) -> Mapping[str, float]:
    """Covariance of advantage and logprob over a rollout batch, and the share of decisions clipped for it.

    The share is that of one optimiser step on the whole batch.
    """
    counted = rollout.counted
    logprobs = require_tensor(rollout.batch.old_logprobs, "old_logprobs")
    values = functional.covariance(rollout.advantages, logprobs, counted)[counted]
    if not len(values):
        return {"covariance_mean": 0.0, "covariance_max": 0.0, "covariance_clip_share": 0.0}
    candidates = int(((band[0] < values) & (values < band[1])).sum())
    return {
        "covariance_mean": float(values.mean()),
        "covariance_max": float(values.max()),
        "covariance_clip_share": min(_count(share, counted), candidates) / len(values),
    }


def without_dual(mini: MiniBatch, context: Context, *, clip: Clip) -> Bounds:
    """The bounds of `clip`, without a second clip of negative advantages."""
    return replace(clip(mini, context), dual=None)


def _count(share: float, counted: Tensor) -> int:
    # Rounded, so that .29 of 100 are 29 whatever the binary form of the share.
    return max(1, int(round(share * int(counted.sum()), 9)))
