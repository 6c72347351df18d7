"""Covariance clipping: leave out a few of the action tokens that reduce the entropy most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nsmallest
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm, clipped_tokens
from agentrl.algorithms.features import share_of
from agentrl.algorithms.hooks import Bounds, Clip, Context, MiniBatch, requires
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, SignedWeight
from agentrl.errors import ConfigError
from agentrl.seeds import derive_seed

Band = tuple[SignedWeight, SignedWeight]
_PUBLISHED_BASE = {"aggregation": "token", "clip_low": 1.0, "clip_high": 1.0}


@recipe("clip_cov")
@dataclass(frozen=True)
class ClipCov(Recipe):
    """Clip-Cov: a few action tokens with a high covariance of advantage and logprob are not learned from.

        cov  = (A - mean A) (logprob - mean logprob),   means over the action tokens of the mini-batch
        loss = loss of the base, with 0 at max(1, floor(share * action tokens)) tokens drawn from the band

    An update lowers the entropy most where the covariance is high. Tokens are drawn uniformly from those with
    band[0] < cov < band[1] whose ratio the base's bounds do not clip, not from the highest. They still count
    in the normaliser. The dual clip of the base does not apply.

        field               | paper      | released   | ours
        base.name           | grpo       | grpo       | grpo
        base.preset         | paper      | released   | ours
        base.aggregation    | token      | token      | sequence
        base.clip_low       | 1.0        | 1.0        | 0.2
        base.clip_high      | 1.0        | 1.0        | 0.2
        base.kl_coefficient | 0.0        | 0.0        | 0.0
        share               | 0.0002     | 0.0002     | 0.0002
        band                | [1.0, 5.0] | [1.0, 5.0] | [1.0, 5.0]

    The paper's objective has no bounds of the ratio; those of the released scripts, 0 and 2, stand in for
    that. The published runs used groups of 8, a temperature of 1 and a learning rate of 5e-7.

    Args:
        base: The recipe whose surrogate is clipped.
        share: The share of the action tokens of a mini-batch that are left out; 0 changes nothing.
        band: The range of covariances from which they are drawn, in nats times the unit of the advantages.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """

    KIND = "token selection"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0, **_PUBLISHED_BASE}},
        "released": {"base": {"name": "grpo", "preset": "released", **_PUBLISHED_BASE}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    share: Share = 0.0002
    band: Band = (1.0, 5.0)

    def build(self) -> Algorithm:
        """Build the base with covariance clipping."""
        return with_covariance_clip(self.base.build(), self.share, self.band)

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        low, high = self.band
        return [
            *super()._contradictions(),
            (not low < high, f"band is {[low, high]}, wanted the lower bound first"),
        ]


def with_covariance_clip(algorithm: Algorithm, share: float, band: Band) -> Algorithm:
    """Return an algorithm whose surrogate clips by covariance instead of by a dual clip.

    Args:
        algorithm: Any algorithm. The mask and the bounds are read from the mini-batch, so they are those of
            the final loss.
        share: The share of action tokens, see `covariance_clip`; 0 returns the algorithm itself.
        band: The range of covariances, see `covariance_clip`.

    Raises:
        ConfigError: If the algorithm clips by covariance already.
    """
    if not share:
        return algorithm
    if any(isinstance(weight, partial) and weight.func is covariance_clip for weight in algorithm.weights):
        raise ConfigError("the base clips by covariance already, wanted it once")
    return replace(
        algorithm,
        clip=None if algorithm.clip is None else partial(without_dual, clip=algorithm.clip),
        weights=(*algorithm.weights, partial(covariance_clip, share=share, band=band)),
        diagnostics=(*algorithm.diagnostics, partial(covariance_metrics, share=share, band=band)),
    )


def without_covariance_clip(clip: Clip | None) -> Clip | None:
    """Return the bounds under those of `with_covariance_clip`; others are returned as they are."""
    return clip.keywords["clip"] if isinstance(clip, partial) and clip.func is without_dual else clip


@requires("current", "covariance")
def covariance_clip(mini: MiniBatch, context: Context, *, share: float, band: Band) -> Tensor:
    """Give a few action tokens the weight 0 and all others the weight 1.

        cov = (A - mean A) * (logprob - mean logprob),   means over the action tokens of the mini-batch

    Only the action tokens in the mask of the mini-batch count. From those with band[0] < cov < band[1] that
    the bounds do not clip, max(1, floor(share * action tokens)) are drawn uniformly, or all if there are
    fewer. The draw depends on the seed, the step, and the token's episode, turn and position in its sequence.

    Args:
        mini: The mini-batch with the covariance, the ratio of the current policy, the mask and the bounds.
        context: Provides the seed and the step.
        share: The share of the action tokens, within (0, 1].
        band: The range of covariances, in nats times the unit of the advantages. That is the unit of rewards,
            unless advantages are divided by a deviation.

    Returns:
        [B, T] float. The normaliser of the loss does not change.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """
    batch, counted, covariance = mini.batch, mini.counted, feature_of(mini, "covariance")
    candidates = counted & (band[0] < covariance) & (covariance < band[1]) & ~clipped_tokens(mini, mini.now)
    rows, positions = candidates.nonzero(as_tuple=True)
    turns = batch.turns[rows, positions].tolist()
    names = [batch.episodes[owner].id for owner in batch.trajectory[rows].tolist()]
    places = list(zip(names, turns, positions.tolist(), strict=True))

    def draw(index: int) -> tuple[int, tuple[str, int, int]]:
        place = places[index]
        return derive_seed("covariance", context.seed, context.step, *place), place

    chosen = nsmallest(share_of(int(counted.sum()), share), range(len(places)), key=draw)
    weights = torch.ones_like(mini.advantages)
    weights[rows[chosen], positions[chosen]] = 0.0
    return weights


@requires("covariance")
def covariance_metrics(
    rollout: MiniBatch, context: Context, *, share: float, band: Band
) -> Mapping[str, float]:
    """Measure the covariance of advantage and logprob, and the share of action tokens clipped by it.

    The share is that of one optimiser step on the whole rollout batch.
    """
    counted = rollout.counted
    values = feature_of(rollout, "covariance")[counted]
    if not len(values):
        return {"covariance_mean": 0.0, "covariance_max": 0.0, "covariance_clip_share": 0.0}
    candidates = int(((band[0] < values) & (values < band[1])).sum())
    return {
        "covariance_mean": float(values.mean()),
        "covariance_max": float(values.max()),
        "covariance_clip_share": min(share_of(int(counted.sum()), share), candidates) / len(values),
    }


def without_dual(mini: MiniBatch, context: Context, *, clip: Clip) -> Bounds:
    """Return the bounds of `clip` without the dual clip."""
    return replace(clip(mini, context), dual=None)
