"""SIREN: hold the entropy of the least certain tokens near that of the first step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import decisions
from agentrl.algorithms.hooks import (
    Context,
    MiniBatch,
    Outputs,
    Term,
    Weights,
    requires,
    steers_entropy,
    token_statistic,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, Weight
from agentrl.data.batch import Batch

PEAK = "siren/peak_entropy"
Inside = Annotated[float, Interval(gt=0, lt=1)]


@recipe("siren")
@dataclass(frozen=True)
class SIREN(Recipe):
    """Selective entropy regularisation: the entropy of the least certain tokens is held at an anchor.

        Hp   = the entropy of the most likely tokens that together stay below `top_p`, renormalised
        peak = Hp > its quantile of the trajectory
        loss = that of the base + coefficient * (mean of Hp over the peaks - anchor)^2

    The mean is over the peaks of a trajectory, then over trajectories. The anchor is that mean before the
    first update of the run, so that the first step has no such loss. With coefficient 0 it is its base.

        field                | paper     | released    | ours
        base.name            | dr_grpo   | dr_grpo     | dr_grpo
        base.preset          | paper     | released    | ours
        base.clip_low        | 0.28      | 0.28        | 0.2
        base.clip_high       | 0.28      | 0.28        | 0.2
        base.kl_coefficient  | 0.0       | 0.0         | 0.0

    The values are those of the released code, which first cuts the distribution at 10 000 tokens and takes
    the statistics of a micro-batch. Groups are of 8 there, the learning rate is 1e-6.

    Args:
        base: The recipe whose loss this adds to.
        coefficient: The coefficient of the squared distance, in loss units per squared nat.
        top_p: The cumulative probability of the tokens whose entropy counts.
        nucleus: Whether the token with which that is reached counts, `inclusive`, or not, `strict`.
        quantile: The share of a trajectory's action tokens that are no peaks.
        anchor: The wanted entropy of the peaks in nats; null measures it in the first step.

    Source: Jiang et al. 2025, arXiv:2509.25133.
    """

    KIND = "entropy"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {
            "base": {"name": "dr_grpo", "preset": "paper", "kl_coefficient": 0.0}
            | {"clip_low": 0.28, "clip_high": 0.28}
        },
        "released": {"base": {"name": "dr_grpo", "preset": "released", "clip_low": 0.28, "clip_high": 0.28}},
    }

    base: Base = field(default_factory=lambda: build_recipe("dr_grpo"))
    coefficient: Weight = 0.005
    top_p: Inside = 0.8
    nucleus: Literal["strict", "inclusive"] = "strict"
    quantile: Share = 0.8
    anchor: Weight | None = None

    def build(self) -> Algorithm:
        """Build the base with the anchored entropy."""
        base = self.base.build()
        name = f"top_p_entropy{'_inclusive' if self.nucleus == 'inclusive' else ''}:{self.top_p}"
        term = Term(
            "siren",
            requires(f"{name}:grad")(partial(nucleus_entropy, name=name)),
            self.strength,
            aggregation=each_token,
            where=steers_entropy(requires("current")(partial(self.peaks, name=name))),
            target=self.target,
        )
        metrics = requires(name)(partial(self.metrics, name=name))
        return replace(base, terms=(*base.terms, term), diagnostics=(*base.diagnostics, metrics))

    def target(self, context: Context) -> float:
        """Return the anchor; 0 while it is unknown."""
        return next(iter(context.past(PEAK)), 0.0) if self.anchor is None else self.anchor

    def strength(self, context: Context) -> float:
        """Return the coefficient; 0 while the anchor is unknown."""
        return self.coefficient if self.anchor is not None or context.past(PEAK) else 0.0

    def peaks(self, mini: MiniBatch, context: Context, *, name: str) -> Tensor:
        """Return the weights of the peaks under the current policy."""
        return peak_weights(token_statistic(mini.now, name), mini.batch, self.quantile)

    def metrics(self, rollout: MiniBatch, context: Context, *, name: str) -> Mapping[str, float]:
        """Return the mean entropy of the peaks before the update, which is the anchor of later steps."""
        values = token_statistic(rollout.batch, name)
        weights = peak_weights(values, rollout.batch, self.quantile)
        return {PEAK: float((weights * values).sum())} if bool(weights.any()) else {}


def peak_weights(values: Tensor, batch: Batch, quantile: float) -> Tensor:
    """Weigh the tokens above the quantile of their trajectory, for a mean of means; [B, T] float64.

    The quantile is interpolated linearly.
    """
    made = decisions(batch)
    # Rounded, so that ties do not depend on floating-point noise.
    found = made.read(values).double().round(decimals=9)
    ordered = torch.where(made.valid, found, torch.inf).sort(dim=1).values
    place = quantile * (made.valid.sum(dim=1, keepdim=True) - 1).clamp(min=0).double()
    if not ordered.shape[1]:
        return torch.zeros_like(values, dtype=torch.float64)
    low, high = (ordered.gather(1, end.long()) for end in (place.floor(), place.ceil()))
    bound = torch.lerp(low, torch.where(high.isfinite(), high, low), place - place.floor())
    peak = made.write((made.valid & (found > bound)).double()) > 0
    weights, count = functional.sequence_weights(peak, batch.turns, batch.trajectory)
    return weights / count.clamp(min=1)


def nucleus_entropy(outputs: Outputs, mini: MiniBatch, context: Context, *, name: str) -> Tensor:
    """Return the entropy of the likely tokens at every token; [B, T] nats, with gradient."""
    return token_statistic(outputs, name)


def each_token(mask: Tensor, turns: Tensor, trajectory: Tensor) -> Weights:
    """Weigh every token by 1, for a sum with weights of its own."""
    return mask.double(), mask.new_ones((), dtype=torch.float64)
