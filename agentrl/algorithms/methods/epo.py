"""EPO: an entropy bonus, and a penalty on entropy outside a band around its past values."""

import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs, Term, require_tensor, requires
from agentrl.algorithms.methods.grpo import entropy_bonus
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Count, PositiveWeight, Steps, Weight
from agentrl.data.batch import Batch

Schedule = Literal["constant", "exponential", "official_epoch", "ramp"]
Smoothing = Literal["hinge", "indicator"]

_RELEASED_EPOCHS = 150
_TURN = "entropy/turn/{:02d}"
_TRAJECTORY = "entropy/trajectory_mean"


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

    The paper's band is that of its reported runs. Its `smoothing` is that of its later version; the earlier
    one had `indicator`. Its formula for beta is known from a summary only. At its penalty the entropy above
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

    PRESETS: ClassVar[Presets] = {
        "paper": {
            "low": 0.0,
            "high": 2.0,
            "penalty": 0.1,
            "reference": "scalar",
            "window": 0,
            "min_history": 1,
            "schedule": "exponential",
        },
        "released": {
            "base": {"name": "grpo", "preset": "released", "kl_coefficient": 0.01},
            "penalty": 0.1,
            "smoothing": "indicator",
            "window": 0,
            "min_history": 1,
            "schedule": "official_epoch",
        },
    }
    OPEN: ClassVar[Collection[str]] = ("penalty", "smoothing", "window", "min_history", "schedule")

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    entropy_coefficient: Weight = 0.001
    low: Weight = 0.5
    high: PositiveWeight = 1.5
    penalty: Weight = 2.0
    smoothing: Smoothing = "hinge"
    reference: Literal["turn", "scalar"] = "turn"
    window: Steps = 20
    min_history: Count = 5
    schedule: Schedule = "constant"
    schedule_rate: Weight = 1.0
    schedule_midpoint: PositiveWeight = 0.6
    parity: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        pull = self.penalty * min(self._beta(step, _RELEASED_EPOCHS) for step in (0, _RELEASED_EPOCHS))
        if self.smoothing == "hinge" and pull <= 1:
            warnings.warn(
                f"epo: penalty times the schedule's lowest weight is {pull:.3g}, wanted above 1: otherwise "
                "entropy above the band is not always pulled down",
                stacklevel=4,
            )

    def build(self) -> Algorithm:
        """Build the base with the entropy bonus and the smoothing penalty."""
        base = self.base.build()
        weights = functional.token_weights if self.preset == "released" else functional.trajectory_weights
        terms = (
            Term("epo_entropy", entropy_bonus, -self.entropy_coefficient, weights),
            Term("epo_smoothing", self.smoothing_loss, self.smoothing_coefficient, weights),
        )
        return replace(
            base,
            terms=(*base.terms, *terms),
            diagnostics=(*base.diagnostics, entropy_levels, self.entropy_band),
        )

    def smoothing_coefficient(self, context: Context) -> float:
        """Return the coefficient of the mean penalty in the loss."""
        return self.entropy_coefficient * self.beta(context) * self.penalty

    def beta(self, context: Context) -> float:
        """Return the weight that the schedule gives the penalty in this step."""
        return self._beta(context.step, context.total_steps)

    @requires("entropy:grad")
    def smoothing_loss(self, outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
        """Return how far the entropy is outside the band, or 0 without one; [B, T].

        The unit is nats with `hinge`; `indicator` gives 0 or 1.
        """
        reference = self.reference_entropies(mini.batch, context)
        known = ~reference.isnan()
        reference = torch.where(known, reference, 0.0)
        if self.smoothing == "hinge":
            outside = functional.entropy_band_violation(outputs.entropies, reference, self.low, self.high)
        else:
            outside = functional.entropy_band_indicator(
                outputs.entropies, reference, self.low, self.high, strict=self.preset == "released"
            )
        return torch.where(known, outside, 0.0)

    def reference_entropies(self, batch: Batch, context: Context) -> Tensor:
        """Return the reference entropy at every token; [B, T] float64 nats, NaN where it is not known yet."""
        present = _recorded_levels(batch) if self.preset == "released" else {}
        if self.reference == "scalar":
            value = self._past_mean(_TRAJECTORY, present, context)
            return torch.full_like(batch.turns, value, dtype=torch.float64)
        count = int(batch.turns.max()) + 1 if batch.turns.numel() else 0
        table = [self._past_mean(_TURN.format(turn), present, context) for turn in range(count)]
        # The last entry belongs to turn -1, which means no turn.
        return torch.tensor([*table, math.nan], dtype=torch.float64, device=batch.turns.device)[batch.turns]

    @requires("entropy")
    def entropy_band(self, mini: MiniBatch, context: Context) -> Mapping[str, float]:
        """Measure the band before the update, and the share of action tokens outside it."""
        entropies = require_tensor(mini.batch.old_entropies, "old_entropies")
        reference = self.reference_entropies(mini.batch, context)
        known = mini.batch.action_mask & ~reference.isnan()
        numbers = {
            "entropy_band/beta": self.beta(context),
            "entropy_band/active": float(functional.masked_mean(known.double(), mini.batch.action_mask)),
        }
        if not bool(known.any()):
            return numbers
        means = {
            "entropy_band/low": self.low * reference,
            "entropy_band/high": self.high * reference,
            "entropy_band/share_below": (entropies < self.low * reference).double(),
            "entropy_band/share_above": (entropies > self.high * reference).double(),
        }
        return numbers | {
            name: float(functional.masked_mean(values, known)) for name, values in means.items()
        }

    def _past_mean(self, name: str, present: Mapping[str, float], context: Context) -> float:
        """Average the logged values of a name in the window; NaN if there are too few."""
        now = [present[name]] if name in present else []
        values = [*context.past(name), *now][-self.window :]
        return fmean(values) if len(values) >= self.min_history else math.nan

    def _beta(self, step: int, total: int) -> float:
        midpoint = self.schedule_midpoint * total
        match self.schedule:
            case "exponential":
                return 1 + math.exp(-self.schedule_rate * step / midpoint)
            case "official_epoch":
                return released_decay(step, _RELEASED_EPOCHS if self.preset == "released" else total)
            case "ramp":
                return min(1.0, step / midpoint)
            case _:
                return 1.0

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (self.low >= self.high, f"low is {self.low}, wanted below high ({self.high})"),
            (
                0 < self.window < self.min_history,
                f"min_history is {self.min_history}, wanted at most the window ({self.window})",
            ),
        ]


def released_decay(step: int, total: int) -> float:
    """Return beta as in the released code: slow fall in the first half, fast in the second, then constant.

        half = total // 2
        1 - 0.2 (1 - exp(-2 step / half))                    up to half
        0.8 exp(-3 (step - half) / (total - half))           after it

    >>> [round(released_decay(step, 150), 6) for step in (0, 75, 76, 150)]
    [1.0, 0.827067, 0.768632, 0.03983]
    """
    half = total // 2
    if step == 0:
        return 1.0
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (min(step, total) - half) / (total - half))


@requires("entropy")
def entropy_levels(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the mean entropy of every turn index and of trajectories, in nats.

    A turn index is averaged over the trajectories with action tokens in that turn. Later steps take their
    reference from these metrics.
    """
    batch = mini.batch
    entropies = require_tensor(batch.old_entropies, "old_entropies").double()
    means, present = functional.turn_means(
        entropies, batch.action_mask, batch.turns, batch.trajectory, len(batch.episodes)
    )
    return _levels(
        [value if decided else None for value, decided in zip(*row, strict=True)]
        for row in zip(means.tolist(), present.tolist(), strict=True)
    )


def _recorded_levels(batch: Batch) -> dict[str, float]:
    """Return `entropy_levels` from the entropies recorded by the rollout.

    They cover the whole rollout batch, even if `batch` is a part of it.
    """
    return _levels([turn.entropy for turn in episode.turns] for episode in batch.episodes)


def _levels(trajectories: Iterable[Sequence[float | None]]) -> dict[str, float]:
    """Average turns (None without action tokens) over trajectories and within them."""
    by_turn: dict[int, list[float]] = defaultdict(list)
    whole = []
    for turns in trajectories:
        decided = {turn: value for turn, value in enumerate(turns) if value is not None}
        for turn, value in decided.items():
            by_turn[turn].append(value)
        if decided:
            whole.append(fmean(decided.values()))
    levels = {_TURN.format(turn): fmean(values) for turn, values in sorted(by_turn.items())}
    return levels | ({_TRAJECTORY: fmean(whole)} if whole else {})
