"""TIS and MIS: tokens weighed, or dropped, by how the learner and the sampler disagree on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import (
    Context,
    MiniBatch,
    TokenHook,
    excludes,
    requires,
    trait,
)
from agentrl.algorithms.importance import (
    IMPORTANCE_WEIGHTS,
    Level,
    Measure,
    importance_measure,
    importance_within,
    log_importance,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveWeight, Weight
from agentrl.data.batch import Batch

corrects = excludes(sampler_ratio="the ratio to the sampler is the importance already")


@recipe("tis")
@dataclass(frozen=True)
class TIS(Recipe):
    """Truncated importance sampling: a token counts by the learner's probability over the sampler's.

        w = min( exp( sum over the sequence of log pi_old - log pi_sampler ), cap ),   or the mean for the sum

    A sequence is a single token, a turn or a trajectory, with its action tokens. Weights do not change what
    losses are divided by. If the sampler is the learner, it is its base. At the level of tokens it is what
    `trainer.importance_cap` puts over any method; the two exclude each other.

        field | paper | released   | ours
        level | token | trajectory | token
        cap   | 2.0   | 2.0        | 2.0

    The released code is verl, where a sequence is a row; SkyRL has 5 there. A product over a long sequence
    drifts away from 1: use turns, or the geometric mean. Sampling must be from the whole distribution.

    Args:
        base: The recipe whose tokens are weighed.
        level: Whose importance a token is weighed by: its own, that of its turn or its trajectory.
        cap: The highest weight.
        geometric: Whether to take the geometric mean over the sequence instead of the product.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; verl.
    """

    KIND = "correction"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {"released": {"level": "trajectory"}}

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    level: Level = "token"
    cap: PositiveWeight = 2.0
    geometric: bool = False

    def build(self) -> Algorithm:
        """Build the base with weighed tokens."""
        base = self.base.build()
        measured = partial(
            importance_measure, level=self.level, by="geometric" if self.geometric else "ratio"
        )
        return replace(
            base,
            weights=(*base.weights, partial(truncated_weights, measured=measured, cap=self.cap)),
            diagnostics=(*base.diagnostics, partial(capped_metrics, measured=measured, cap=self.cap)),
        )


@recipe("mis")
@dataclass(frozen=True)
class MIS(Recipe):
    """Masked importance sampling: tokens on which learner and sampler disagree too much are dropped.

        w   = pi_old / pi_sampler of a token; a sequence is a single token, a turn or a trajectory
        keep a sequence with low <= x <= high, where x is
            ratio: the product of its w,    geometric: their geometric mean,
            k3: the mean of w - 1 - log w,  each: every single w

    Kept tokens count with their w (`weighted`), or once. Dropped ones stay in what losses are divided by,
    unless `renormalise`. If the sampler is the learner, it is its base.

        field | paper | released | ours
        low   | 0.5   | 0.2      | 0.5
        high  | 5.0   | 2.0      | 5.0

    The default is IcePop. The bounds of verl's `k1` act on 1 / w, so that its "0.5_5.0" is [0.2, 2] here,
    which is what `released` has. Published rules are, weighted false: `geometric` in [0.99, 1.01], `ratio` in
    [0.5, 2], both by sequence, `ratio` in [0.5, 2] by token, `k3` in [0, 0.01], and SkyRL's `each` in
    [0.0001, 100]. For a rejected token verl changes the mask (`renormalise`), SkyRL the weight. Sampling must
    be from the whole distribution.

    Args:
        base: The recipe whose tokens are dropped.
        level: What is kept or dropped as a whole.
        by: What is compared with the bounds.
        low: The lowest value that is kept.
        high: The highest value that is kept.
        weighted: Whether a kept token counts with its own importance.
        renormalise: Whether losses are divided by what is kept.

    Source: Ling Team 2025, arXiv:2510.18855 (IcePop); verl; SkyRL; prime-rl.
    """

    KIND = "correction"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {"released": {"low": 0.2, "high": 2.0}}

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    level: Level = "token"
    by: Measure = "ratio"
    low: Weight = 0.5
    high: PositiveWeight = 5.0
    weighted: bool = True
    renormalise: bool = False

    def build(self) -> Algorithm:
        """Build the base with dropped tokens."""
        base = self.base.build()
        kept = partial(importance_within, level=self.level, by=self.by, low=self.low, high=self.high)
        weights: tuple[TokenHook, ...] = (partial(kept_weights, kept=kept, weighted=self.weighted),)
        masks: tuple[TokenHook, ...] = ()
        if self.renormalise:
            masks = (partial(kept_tokens, kept=kept),)
            weights = weights if self.weighted else ()
        return replace(
            base,
            masks=(*base.masks, *masks),
            weights=(*base.weights, *weights),
            diagnostics=(*base.diagnostics, partial(rejected_metrics, kept=kept)),
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [(self.low > self.high, f"low is {self.low}, wanted at most high, {self.high}")]


@trait(IMPORTANCE_WEIGHTS)
@corrects
@requires("old_logprobs")
def truncated_weights(
    mini: MiniBatch, context: Context, *, measured: Callable[[Batch], Tensor], cap: float
) -> Tensor:
    """Return the truncated importance of each action token, 1 elsewhere; [B, T] float64."""
    return torch.where(mini.batch.action_mask, measured(mini.batch).clamp(max=cap), 1.0)


@requires("old_logprobs")
def capped_metrics(
    rollout: MiniBatch, context: Context, *, measured: Callable[[Batch], Tensor], cap: float
) -> Mapping[str, float]:
    """Measure the share of action tokens whose weight the cap limits: mismatch/capped."""
    above = (measured(rollout.batch) > cap)[rollout.batch.action_mask]
    return {"mismatch/capped": float(above.double().mean())} if len(above) else {}


@trait(IMPORTANCE_WEIGHTS)
@corrects
@requires("old_logprobs")
def kept_weights(
    mini: MiniBatch, context: Context, *, kept: Callable[[Batch], Tensor], weighted: bool
) -> Tensor:
    """Return the importance of each action token, or 1, and 0 where it is dropped; [B, T] float64."""
    importance = log_importance(mini.batch).exp()
    return torch.where(kept(mini.batch), importance if weighted else 1.0, 0.0)


@trait(IMPORTANCE_WEIGHTS)
@corrects
@requires("old_logprobs")
def kept_tokens(mini: MiniBatch, context: Context, *, kept: Callable[[Batch], Tensor]) -> Tensor:
    """Mark the action tokens that are not dropped; [B, T] bool."""
    return kept(mini.batch)


@requires("old_logprobs")
def rejected_metrics(
    rollout: MiniBatch, context: Context, *, kept: Callable[[Batch], Tensor]
) -> Mapping[str, float]:
    """Measure the share of action tokens that are dropped: mismatch/rejected."""
    dropped = ~kept(rollout.batch)[rollout.batch.action_mask]
    return {"mismatch/rejected": float(dropped.double().mean())} if len(dropped) else {}
