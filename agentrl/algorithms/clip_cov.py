"""Covariance clipping: a few of the decisions that cost the policy most of its entropy are left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import nsmallest

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import (
    Algorithm,
    Bounds,
    Clip,
    Context,
    MiniBatch,
    Ratio,
    TokenHook,
    given,
    requires,
)
from agentrl.errors import RequirementError
from agentrl.seeds import derive_seed

Band = tuple[float, float]


def with_covariance_clip(algorithm: Algorithm, share: float, band: Band) -> Algorithm:
    """Have an algorithm's surrogate clip by covariance, which takes the place of its dual clip.

    Args:
        algorithm: of which the ratio and its bounds say what is clipped already, and the masks what counts.
        share: of the decisions, see `covariance_clip`; 0 gives the algorithm itself.
        band: likewise.
    """
    if not share:
        return algorithm
    clip = None if algorithm.clip is None else partial(without_dual, clip=algorithm.clip)
    masks = algorithm.masks
    chosen = partial(covariance_clip, share=share, band=band, ratio=algorithm.ratio, clip=clip, masks=masks)
    numbers = partial(covariance_numbers, share=share, band=band, masks=masks)
    return replace(
        algorithm,
        clip=clip,
        weights=(*algorithm.weights, chosen),
        diagnostics=(*algorithm.diagnostics, numbers),
    )


@requires("current")
def covariance_clip(
    mini: MiniBatch,
    context: Context,
    *,
    share: float,
    band: Band,
    ratio: Ratio,
    clip: Clip | None,
    masks: Sequence[TokenHook] = (),
) -> Tensor:
    """Weigh a few decisions with 0 and all others with 1.

        cov = (A - mean A) * (logprob - mean logprob),   means over the decisions of the mini-batch

    The decisions are those that `masks` leave in the loss. Among those with band[0] < cov < band[1] that
    `clip` does not hold back, max(1, floor(share * decisions)) are drawn, each with the same chance, or all
    if they are fewer. The draw depends on the seed, the step, and the decision's episode, turn and position
    in its sequence.

    Args:
        mini: with what the policy says now.
        context: for the seed and the step.
        share: of the decisions, within (0, 1].
        band: in nats times the unit of the advantages, which is that of rewards unless they are divided by a
            deviation.
        ratio: that of the loss.
        clip: that of the loss; None if nothing is clipped.
        masks: those of the loss.

    Returns:
        [B, T] float. The normaliser of the loss is not touched: a weight of 0 leaves a gap.

    Raises:
        RequirementError: if `mini.current` is empty.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """
    current, batch = mini.current, mini.batch
    if current is None:
        raise RequirementError("MiniBatch.current is empty; covariance clipping reads it")
    counted = _counted(mini, context, masks)
    covariance = functional.covariance(mini.advantages, current.logprobs, counted)
    candidates = counted & (band[0] < covariance) & (covariance < band[1])
    if clip is not None and batch.old_logprobs is not None:
        bounds = clip(mini, context)
        candidates &= ~functional.clipped(ratio(current, mini), mini.advantages, bounds.lower, bounds.upper)
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
def covariance_numbers(
    rollout: MiniBatch, context: Context, *, share: float, band: Band, masks: Sequence[TokenHook] = ()
) -> Mapping[str, float]:
    """Covariance of advantage and logprob over a rollout batch, and the share of decisions clipped for it.

    The share is that of one optimiser step on the whole batch.
    """
    counted = _counted(rollout, context, masks)
    logprobs = given(rollout.batch.old_logprobs, "old_logprobs")
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


def _counted(mini: MiniBatch, context: Context, masks: Sequence[TokenHook]) -> Tensor:
    """The decisions that are in the loss; [B, T] bool."""
    counted = mini.batch.sampled
    for mask in masks:
        counted = counted & mask(mini, context)
    return counted


def _count(share: float, counted: Tensor) -> int:
    return max(1, int(share * int(counted.sum())))
