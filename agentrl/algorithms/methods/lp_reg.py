"""Lp-Reg: keep the probability of unlikely tokens that are no noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import K3_LIMIT
from agentrl.algorithms.features import highest_tokens, share_of
from agentrl.algorithms.hooks import (
    ADAPTIVE_BOUNDS,
    Bounds,
    Clip,
    Context,
    MiniBatch,
    Outputs,
    Term,
    TokenHook,
    excludes,
    require_tensor,
    requires,
    token_statistic,
    trait,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, Share, Weight


@recipe("lp_reg")
@dataclass(frozen=True)
class LpReg(Recipe):
    """Low-probability regularisation: unlikely tokens that are penalised are held near a filtered policy.

        log q = log pi_old - log Z,   Z = the old probability of the tokens with p >= min_p * max p
        loss  = that of the base, and of the selected tokens  -A ratio + coefficient (exp(d) - d - 1),
                d = log q - log pi

    Of the tokens in the surrogate with A < 0, the max(1, floor(share * their number)) of lowest probability
    are candidates; those that the filter keeps and that have log pi < log q are selected. A token that the
    filter drops is noise, and no penalty holds it. The abstract has KL(q || pi); this is its estimate from
    the sampled token. With share 0 it is its base.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.clip_low       | 1.0   | 1.0      | 0.2
        base.clip_high      | 9.0   | 9.0      | 0.2
        base.dual_clip      | null  | null     | null
        base.kl_coefficient | 0.0   | 0.0      | 0.0

    The preset `released` selects nothing if there is only one candidate, so that at the share 0.01 a batch of
    fewer than 200 tokens with A < 0 gets nothing, and clamps the penalty to +-10. There the statistics are
    those of a micro-batch. The published runs made one update per batch, with groups of 8.

    Args:
        base: The recipe whose loss is replaced at the selected tokens.
        share: The share of the tokens with a negative advantage that are candidates.
        min_p: The lowest probability that is no noise, relative to that of the most likely token.
        coefficient: The coefficient of the penalty, in loss units per nat.

    Source: Huang et al. 2025, arXiv:2510.03222.
    """

    KIND = "token selection"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {
            "base": {"name": "grpo", "preset": preset, "kl_coefficient": 0.0}
            | {"clip_low": 1.0, "clip_high": 9.0, "dual_clip": None}
        }
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    share: Share = 0.01
    min_p: PositiveShare = 0.02
    coefficient: Weight = 1.0

    def build(self) -> Algorithm:
        """Build the base with the penalty in place of the clip at the selected tokens."""
        base = self.base.build()
        if not self.share:
            return base
        names = [f"log_z_minp:{self.min_p}", f"in_minp:{self.min_p}"]
        filtered = requires("old_logprobs", *names)
        where = requires("current")(filtered(partial(self.selected, names=names)))
        limit = K3_LIMIT if self.preset == "released" else None
        penalty = filtered(partial(divergence, names=names, limit=limit))
        term = Term("lp_reg", penalty, self.coefficient, where=where)
        clip = base.clip
        if clip is not None:
            clip = requires("current", *names)(partial(without_clip, base=clip, where=where))
        return replace(base, clip=clip, terms=(*base.terms, term))

    def selected(self, mini: MiniBatch, context: Context, *, names: Sequence[str]) -> Tensor:
        """Mark the tokens that are penalised; [B, T] bool."""
        logprobs, punished = mini.now.logprobs, mini.counted & (mini.advantages < 0)
        count = share_of(int(punished.sum()), self.share)
        if count < 2 and self.preset == "released":
            return torch.zeros_like(punished)
        candidates = highest_tokens(-logprobs, punished, count, mini.batch)
        return candidates & (logprobs < filtered_logprobs(mini, names))


def filtered_logprobs(mini: MiniBatch, names: Sequence[str]) -> Tensor:
    """Return log q of each sampled token, -inf where the filter drops it; [B, T] nats."""
    mass, kept = (token_statistic(mini.batch, name) for name in names)
    old = require_tensor(mini.batch.old_logprobs, "old_logprobs")
    return torch.where(kept > 0, old - mass, -torch.inf)


def divergence(
    outputs: Outputs, mini: MiniBatch, context: Context, *, names: Sequence[str], limit: float | None
) -> Tensor:
    """Return exp(d) - d - 1 of each token, 0 where the filter drops it, in +-limit; [B, T] nats."""
    kept = filtered_logprobs(mini, names)
    reference = torch.where(kept.isfinite(), kept, outputs.logprobs.detach())
    found = functional.kl_k3(outputs.logprobs, reference)
    return found if limit is None else found.clamp(-limit, limit)


@trait(ADAPTIVE_BOUNDS)
@excludes(sequence_ratio="it frees single tokens from the clip, not sequences")
def without_clip(mini: MiniBatch, context: Context, *, base: Clip, where: TokenHook) -> Bounds:
    """Return the bounds of the base, and none at the selected tokens, whose advantages are negative."""
    bounds, free = base(mini, context), where(mini, context)

    def freed(bound: Tensor | float, end: float) -> Tensor:
        return torch.where(free, end, torch.as_tensor(bound, device=free.device))

    dual = None if bounds.dual is None else freed(bounds.dual, torch.inf)
    return replace(bounds, lower=freed(bounds.lower, 0.0), dual=dual)
