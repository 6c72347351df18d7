"""EPO: an entropy bonus, and a corridor around past entropy that keeps it from collapsing or exploding."""

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
from agentrl.errors import ConfigError

Schedule = Literal["constant", "exponential", "official_epoch", "ramp"]
Smoothing = Literal["hinge", "indicator"]

_RELEASED_EPOCHS = 150
_TURN = "entropy/turn/{:02d}"
_TRAJECTORY = "entropy/trajectory_mean"


@recipe("epo")
@dataclass(frozen=True)
class EPO(Recipe):
    """Entropy-regularised policy optimisation: any base, with an entropy bonus and entropy smoothing.

        loss = base - entropy_coefficient * (H - beta * penalty * S)
        S    = max(low * ref - H, 0) + max(H - high * ref, 0)      at every decision

    H and S are averaged over the decisions of a turn, then over turns, then over trajectories. The reference
    is the mean entropy of earlier steps, beta the schedule's weight in this one. Above the corridor entropy
    is pulled down only where beta * penalty > 1.

    The preset `released` does what the released code does, and so does `parity: official`, which leaves the
    base as it is and takes of the table what is open below (a `base` has a preset of its own):
    - the penalty is the same for every decision outside the corridor or on its bounds, so that it shows in
      the loss and moves no weight;
    - H and the penalty are means over the decisions of the batch;
    - the reference counts every step so far and the present one, as the rollout recorded it;
    - beta falls over 150 steps, however long the run is.

    Not reproduced, as they change no more than the logged loss: penalties given to micro-batches with a turn
    from the 25th on only, and short histories padded with zeros.

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

    The paper's corridor is that of its reported runs, and its `smoothing` that of its later version, before
    which it was `indicator`. Its formula for beta is known from a summary only. At its penalty entropy above
    the corridor is not pulled down, of which the recipe warns.

    Args:
        base: the recipe whose loss this adds to.
        entropy_coefficient: of both, in loss units per nat.
        low: lower bound of the corridor, as a multiple of the reference.
        high: upper bound, likewise.
        penalty: of a nat outside the corridor, relative to a nat of bonus.
        smoothing: `hinge` is S above; `indicator` is 1 outside the corridor, and has no gradient.
        reference: `turn` compares a decision with past turns of the same index, `scalar` with past
            trajectories.
        window: how many past steps the reference is the mean of, 0 for all.
        min_history: how many there must be before a penalty applies.
        schedule: of beta by step k: `exponential` is 1 + exp(-schedule_rate * k / mid), `ramp` is
            min(1, k / mid), `official_epoch` falls from 1 to 0.04 in two pieces.
        schedule_rate: see `schedule`.
        schedule_midpoint: mid, as a share of all steps.
        parity: see above; `paper` says nothing. Null in penalty, smoothing, window, min_history and schedule
            is what the preset has.

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
        if mistakes := self._mistakes():
            raise ConfigError("; ".join(mistakes))
        pull = self.penalty * min(self._beta(step, _RELEASED_EPOCHS) for step in (0, _RELEASED_EPOCHS))
        if self.smoothing == "hinge" and pull <= 1:
            warnings.warn(
                f"epo: penalty times the schedule's lowest weight is {pull:.3g}, wanted above 1: "
                "as it is, entropy above the corridor is not always pulled down",
                stacklevel=4,
            )

    def build(self) -> Algorithm:
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
        """Of the mean penalty in the loss."""
        return self.entropy_coefficient * self.beta(context) * self.penalty

    def beta(self, context: Context) -> float:
        """Weight of the penalty in this step, by the schedule."""
        return self._beta(context.step, context.total_steps)

    @requires("entropy:grad")
    def smoothing_loss(self, outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
        """How far entropy is outside the corridor, 0 while there is none; [B, T] nats (indicator: 0 or 1)."""
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
        """The middle of the corridor at every token; [B, T] float64 nats, NaN where it is not known yet."""
        present = _recorded_levels(batch) if self.preset == "released" else {}
        if self.reference == "scalar":
            value = self._past_mean(_TRAJECTORY, present, context)
            return torch.full_like(batch.turns, value, dtype=torch.float64)
        count = int(batch.turns.max()) + 1 if batch.turns.numel() else 0
        table = [self._past_mean(_TURN.format(turn), present, context) for turn in range(count)]
        # The last entry is that of turn -1: no turn at all.
        return torch.tensor([*table, math.nan], dtype=torch.float64, device=batch.turns.device)[batch.turns]

    @requires("entropy")
    def entropy_band(self, mini: MiniBatch, context: Context) -> Mapping[str, float]:
        """Where the corridor was before the update, and how many decisions were outside it."""
        entropies = require_tensor(mini.batch.old_entropies, "old_entropies")
        reference = self.reference_entropies(mini.batch, context)
        known = mini.batch.sampled & ~reference.isnan()
        numbers = {
            "corridor/beta": self.beta(context),
            "corridor/active": float(functional.masked_mean(known.double(), mini.batch.sampled)),
        }
        if not bool(known.any()):
            return numbers
        means = {
            "corridor/low": self.low * reference,
            "corridor/high": self.high * reference,
            "corridor/share_below": (entropies < self.low * reference).double(),
            "corridor/share_above": (entropies > self.high * reference).double(),
        }
        return numbers | {
            name: float(functional.masked_mean(values, known)) for name, values in means.items()
        }

    def _past_mean(self, name: str, present: Mapping[str, float], context: Context) -> float:
        """Mean of what was logged under a name in the window, NaN where that is too little."""
        now = [present[name]] if name in present else []
        values = [*context.history.get(f"learner/{name}", ()), *now][-self.window :]
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

    def _mistakes(self) -> Sequence[str]:
        found = []
        if self.low >= self.high:
            found.append(f"low is {self.low}, wanted below high ({self.high})")
        if 0 < self.window < self.min_history:
            found.append(f"min_history is {self.min_history}, wanted at most the window ({self.window})")
        return found


def released_decay(step: int, total: int) -> float:
    """Fall slowly in the first half, fast in the second, and stay from `total` on.

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
    """Mean entropy of every turn over the trajectories that decided in it, and of trajectories; in nats.

    Later steps have their reference from these numbers.
    """
    batch = mini.batch
    entropies = require_tensor(batch.old_entropies, "old_entropies").double()
    means, present = functional.turn_means(
        entropies, batch.sampled, batch.turns, batch.trajectory, len(batch.episodes)
    )
    return _levels(
        [value if decided else None for value, decided in zip(*row, strict=True)]
        for row in zip(means.tolist(), present.tolist(), strict=True)
    )


def _recorded_levels(batch: Batch) -> dict[str, float]:
    """The same as the rollout recorded it, of the whole rollout batch even where `batch` is a part of it."""
    return _levels([turn.entropy for turn in episode.turns] for episode in batch.episodes)


def _levels(trajectories: Iterable[Sequence[float | None]]) -> dict[str, float]:
    """Average turns, None for one without a decision, over trajectories and within them."""
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
