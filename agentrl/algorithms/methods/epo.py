"""EPO: an entropy bonus, and a penalty on entropy outside a band around its past values."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import entropy_bonus
from agentrl.algorithms.entropy_band import EntropyBand, ReferenceLevel, entropy_levels
from agentrl.algorithms.hooks import SCHEDULED, Context, Term, trait
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Count, PositiveWeight, Steps, Weight
from agentrl.schedule import PenaltySchedule, penalty_weight

_RELEASED_EPOCHS = 150
_PUBLISHED: dict[str, Any] = {"penalty": 0.1, "window": 0, "min_history": 1}  # in paper and released code


@recipe("epo")
@dataclass(frozen=True)
class EPO(Recipe):
    """Entropy-regularised policy optimisation: any base, with an entropy bonus and entropy smoothing.

        loss = loss of the base - entropy_coefficient * (H - beta * penalty * S)
        S    = max(low * ref - H, 0) + max(H - high * ref, 0),   at every action token

    The penalty S keeps the entropy H in the band [low * ref, high * ref], so that it neither collapses nor
    explodes. H and S are averaged over the action tokens of a turn, then over turns, then over trajectories.
    The reference `ref` is the mean entropy of earlier steps, and beta is the weight that the schedule gives
    the current step. Above the band the entropy is pulled down only if beta * penalty > 1.

    The preset `released` follows the released code. So does `parity: official`, which leaves the base
    unchanged (a `base` has its own preset) and sets only those fields of the table that `parity` names below:
    - the penalty is the same for every action token outside the band or on its bounds, so that it appears in
      the loss but changes no weight;
    - H and the penalty are means over the action tokens of the batch;
    - the reference includes every step so far and the current one, as recorded by the rollout;
    - beta falls over 150 steps, however long the run is.

    Not reproduced, because they only change the logged loss: penalties that apply to micro-batches with a
    turn from the 25th on only, and short histories padded with zeros.

        field               | paper       | released       | ours
        base.name           | grpo        | grpo           | grpo
        base.preset         | ours        | released       | ours
        base.kl_coefficient | 0.0         | 0.01           | 0.0
        low                 | 0.0         | 0.5            | 0.5
        high                | 2.0         | 1.5            | 1.5
        penalty             | 0.1         | 0.1            | 2.0
        smoothing           | hinge       | indicator      | hinge
        reference           | scalar      | turn           | turn
        window              | 0           | 0              | 20
        min_history         | 1           | 1              | 5
        schedule            | exponential | official_epoch | constant

    The paper's band is that of its reported runs, its `smoothing` that of its later version (`indicator` in
    the earlier one), and its formula for beta is known from a summary only. At its penalty the entropy above
    the band is not pulled down; the recipe warns about that.

    Args:
        base: The recipe whose loss this adds to.
        entropy_coefficient: The coefficient of bonus and penalty, in loss units per nat.
        low: The lower bound of the band, as a multiple of the reference.
        high: The upper bound of the band, as a multiple of the reference.
        penalty: The weight of a nat outside the band, relative to a nat of bonus.
        smoothing: `hinge` is S above; `indicator` is 1 outside the band, and has no gradient.
        reference: `turn` compares an action token with past turns of the same index, `scalar` compares it
            with past trajectories.
        window: The number of past steps in the reference, 0 for all.
        min_history: The number of past steps that must be known before a penalty applies.
        schedule: beta at step k: `constant` is 1, `exponential` is 1 + exp(-schedule_rate * k / mid), `ramp`
            is min(1, k / mid), `official_epoch` falls from 1 to 0.04 in two pieces.
        schedule_rate: See `schedule`.
        schedule_midpoint: mid in `schedule`, as a share of all steps.
        parity: See above; `paper` has no effect. null in penalty, smoothing, window, min_history and schedule
            takes the value of the preset.

    Source: Xu et al. 2025, arXiv:2509.22576.
    """

    KIND = "entropy"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": _PUBLISHED | {"low": 0.0, "high": 2.0, "reference": "scalar", "schedule": "exponential"},
        "released": _PUBLISHED
        | {
            "base": {"name": "grpo", "preset": "released", "kl_coefficient": 0.01},
            "smoothing": "indicator",
            "schedule": "official_epoch",
        },
    }
    OPEN: ClassVar[Collection[str]] = ("penalty", "smoothing", "window", "min_history", "schedule")

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    entropy_coefficient: Weight = 0.001
    low: Weight = 0.5
    high: PositiveWeight = 1.5
    penalty: Weight = 2.0
    smoothing: Literal["hinge", "indicator"] = "hinge"
    reference: ReferenceLevel = "turn"
    window: Steps = 20
    min_history: Count = 5
    schedule: PenaltySchedule = "constant"
    schedule_rate: Weight = 1.0
    schedule_midpoint: PositiveWeight = 0.6
    parity: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [Context(step, total_steps=_RELEASED_EPOCHS) for step in (0, _RELEASED_EPOCHS)]
        pull = self.penalty * min(map(self.beta, ends))
        if self.smoothing == "hinge" and pull <= 1:
            warnings.warn(
                f"epo: penalty times the schedule's lowest weight is {pull:.3g}, wanted above 1: otherwise "
                "entropy above the band is not always pulled down",
                stacklevel=4,
            )

    def build(self) -> Algorithm:
        """Build the base with the entropy bonus and the smoothing penalty."""
        base, released = self.base.build(), self.preset == "released"
        band = EntropyBand(
            low=self.low,
            high=self.high,
            level=self.reference,
            window=self.window,
            min_history=self.min_history,
            weight=self.beta,
            released=released,
        )
        outside = band.violation if self.smoothing == "hinge" else band.indicator
        weights = functional.token_weights if released else functional.trajectory_weights
        fixed = self.schedule == "constant" or (released and self.schedule == "official_epoch")
        coefficient = self.smoothing_coefficient if fixed else trait(SCHEDULED)(self.smoothing_coefficient)
        bonus = Term("epo_entropy", entropy_bonus, -self.entropy_coefficient, weights)
        smoothing = Term("epo_smoothing", outside, coefficient, weights)
        diagnostics = (*base.diagnostics, entropy_levels, band.metrics)
        return replace(base, terms=(*base.terms, bonus, smoothing), diagnostics=diagnostics)

    def smoothing_coefficient(self, context: Context) -> float:
        """Return the coefficient of the mean penalty in the loss."""
        return self.entropy_coefficient * self.beta(context) * self.penalty

    def beta(self, context: Context) -> float:
        """Return the weight that the schedule gives the penalty in this step."""
        fixed = self.preset == "released" and self.schedule == "official_epoch"
        total = _RELEASED_EPOCHS if fixed else context.total_steps
        return penalty_weight(
            self.schedule, context.step, total, midpoint=self.schedule_midpoint, rate=self.schedule_rate
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        short = 0 < self.window < self.min_history
        return [
            *super()._contradictions(),
            (self.low >= self.high, f"low is {self.low}, wanted below high ({self.high})"),
            (short, f"min_history is {self.min_history}, wanted at most the window ({self.window})"),
        ]
