"""BAPO: bounds of the ratio that widen until positive advantages have their part of the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_clipped
from agentrl.algorithms.hooks import (
    ADAPTIVE_BOUNDS,
    Bounds,
    Clip,
    Context,
    MiniBatch,
    excludes,
    require_tensor,
    requires,
    trait,
)
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import PositiveShare, Share, Weight

Upper = Annotated[float, Interval(ge=1, le=100)]
Step = Annotated[float, Interval(ge=0.01, le=100)]

ROUNDING = 1e-6  # a target that is missed by less is met, or noise would decide between equal sides


@recipe("bapo")
@dataclass(frozen=True)
class BAPO(Recipe):
    """Balanced policy optimisation with adaptive clipping: bounds per mini-batch, by the balance of signs.

        P = sum of ratio |A| where A > 0,   N = the same where A < 0,   over tokens that are not clipped
        while P / (P + N) < target: raise the lower bound to its maximum, then the upper bound to its own

    A higher lower bound takes unlikely tokens out of N; a higher upper bound lets likely ones into P. The
    dual clip is that of the base. With a target of 0 the bounds stay the first ones.

        field               | paper      | released   | ours
        base.name           | grpo       | grpo       | grpo
        base.preset         | paper      | released   | ours
        base.kl_coefficient | 0.0        | 0.0        | 0.0
        lower               | [0.6, 0.9] | [0.6, 0.8] | [0.6, 0.9]
        upper               | [1.2, 3.0] | [1.2, 2.0] | [1.2, 3.0]
        target              | 0.5        | 1.0        | 0.5
        contribution        | gradient   | surrogate  | gradient

    The released code differs from the text in two ways, which we take for mistakes. Its target is the ratio
    P / N instead of the share P / (P + N), so that the 0.5 of its example script is a share of a third. And
    clipped tokens count, at the bound, so that a higher lower bound raises N, away from the target.
    `contribution: surrogate` reproduces both. The script has `lower` [0.8, 0.95] and `upper_step` 0.1. The
    paper's values are those of the README; its runs used an internal framework.

    Args:
        base: The recipe whose bounds are replaced.
        lower: The first and the highest lower bound of the ratio.
        upper: The first and the highest upper bound of the ratio.
        lower_step: By how much the lower bound is raised at a time.
        upper_step: By how much the upper bound is raised at a time.
        target: The wanted balance: P / (P + N) of `gradient`, P / N of `surrogate`.
        contribution: What a clipped token adds to P or N: nothing (`gradient`), as it has no gradient, or |A|
            times the bound (`surrogate`).

    Source: Xi et al. 2025, arXiv:2510.18927.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released"}, "contribution": "surrogate"}
        | {"lower": (0.6, 0.8), "upper": (1.2, 2.0), "target": 1.0},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    lower: tuple[Share, PositiveShare] = (0.6, 0.9)
    upper: tuple[Upper, Upper] = (1.2, 3.0)
    lower_step: Step = 0.05
    upper_step: Step = 0.05
    target: Weight = 0.5
    contribution: Literal["gradient", "surrogate"] = "gradient"

    def build(self) -> Algorithm:
        """Build the base with adaptive bounds."""
        base, clip = build_clipped(self.base, self.name)
        return replace(base, clip=partial(self.balanced_clip, base=clip))

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            (self.lower[0] > self.lower[1], f"lower is {self.lower}, wanted the first bound first"),
            (self.upper[0] > self.upper[1], f"upper is {self.upper}, wanted the first bound first"),
            (
                self.contribution == "gradient" and self.target > 1,
                f"target is {self.target}, wanted a share of at most 1 with contribution=gradient",
            ),
        ]

    @trait(ADAPTIVE_BOUNDS)
    @requires("current")
    @excludes(sequence_ratio="its bounds are those of single tokens")
    def balanced_clip(self, mini: MiniBatch, context: Context, *, base: Clip) -> Bounds:
        """Return the first bounds with the wanted balance, or the last ones, with the base's dual clip."""
        found = require_tensor(mini.now.ratio, "ratio")
        ratio = found[mini.counted].double()
        advantages = mini.advantages[mini.counted].double()
        bounds = base(mini, context)

        def met(lower: float, upper: float) -> bool:
            tried = replace(bounds, lower=lower, upper=upper)
            measure = gradient_share if self.contribution == "gradient" else surrogate_balance
            return measure(ratio, advantages, tried) >= self.target - ROUNDING

        lowers, uppers = _grid(*self.lower, self.lower_step), _grid(*self.upper, self.upper_step)
        lower = next((value for value in lowers if met(value, uppers[0])), lowers[-1])
        upper = next((value for value in uppers if met(lower, value)), uppers[-1])
        return replace(bounds, lower=lower, upper=upper)


def gradient_share(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> float:
    """Return the part of positive advantages in ratio |A| of the tokens not clipped; 1 if all are clipped."""
    active = ~functional.clipped(ratio, advantages, bounds.lower, bounds.upper)
    if bounds.dual is not None:
        active &= (advantages > 0) | (ratio <= bounds.dual)
    values = (ratio * advantages)[active]
    total = float(values.abs().sum())
    return float(values.clamp(min=0).sum()) / total if total else 1.0


def surrogate_balance(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> float:
    """Return the clipped surrogate of positive over that of negative advantages; inf without negatives."""
    positive = (ratio.clamp(max=bounds.upper) * advantages.clamp(min=0)).sum()
    negative = (ratio.clamp(min=bounds.lower) * (-advantages).clamp(min=0)).sum()
    return float(positive / (negative + 1e-8)) if bool((advantages < 0).any()) else math.inf


def _grid(first: float, last: float, step: float) -> list[float]:
    """Return the bounds from the first to the last one, by steps; rounded, so that 1.2 + 4 * 0.05 is 1.4."""
    count = math.ceil(round((last - first) / step, 9))
    return [min(last, round(first + index * step, 9)) for index in range(count + 1)]
