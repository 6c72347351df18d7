"""Entropy band: how far the entropy is from what it was in past steps."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.hooks import Coefficient, Context, MiniBatch, Outputs, require_tensor, requires
from agentrl.data.batch import Batch

ReferenceLevel = Literal["turn", "scalar"]
Measure = Callable[[Tensor, Tensor, float, float], Tensor]  # entropies, reference, low, high -> [B, T]

_TURN = "entropy/turn/{:02d}"
_TRAJECTORY = "entropy/trajectory_mean"


@dataclass(frozen=True)
class EntropyBand:
    """Band [low * ref, high * ref], in which `ref` is the mean entropy that past steps logged.

    An algorithm with a band has `entropy_levels` among its diagnostics, which logs what later steps read.

    Args:
        low: The lower bound, as a multiple of the reference.
        high: The upper bound, likewise.
        level: `turn` compares an action token with past turns of the same index, `scalar` compares it with
            past trajectories.
        window: The number of past steps in the reference, 0 for all.
        min_history: The number of steps that must be known; with fewer, nothing is outside the band.
        weight: The weight of the penalty as a function of the context, for `metrics`.
        released: Follow the released code of EPO: the reference includes the current step, as recorded by
            the rollout; an entropy exactly on a bound is outside.

    Source: Xu et al. 2025, arXiv:2509.22576.
    """

    low: float
    high: float
    level: ReferenceLevel
    window: int
    min_history: int
    weight: Coefficient
    released: bool = False

    def reference(self, batch: Batch, context: Context) -> Tensor:
        """Return the reference entropy at every token; [B, T] float64 nats, NaN where it is not known yet."""
        present = _recorded_levels(batch) if self.released else {}
        if self.level == "scalar":
            value = self._past_mean(_TRAJECTORY, present, context)
            return torch.full_like(batch.turns, value, dtype=torch.float64)
        count = int(batch.turns.max()) + 1 if batch.turns.numel() else 0
        table = [self._past_mean(_TURN.format(turn), present, context) for turn in range(count)]
        # The last entry belongs to turn -1, which means no turn.
        return torch.tensor([*table, math.nan], dtype=torch.float64, device=batch.turns.device)[batch.turns]

    @requires("entropy:grad")
    def violation(self, outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
        """Return how far the entropy is outside the band, or 0 without one; [B, T] nats, with gradient."""
        return self._measured(functional.entropy_band_violation, outputs, mini, context)

    @requires("entropy:grad")
    def indicator(self, outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
        """Return 1 where the entropy is outside the band, and 0 elsewhere; [B, T], without gradient."""

        def outside(entropies: Tensor, reference: Tensor, low: float, high: float) -> Tensor:
            return functional.entropy_band_indicator(entropies, reference, low, high, strict=self.released)

        return self._measured(outside, outputs, mini, context)

    @requires("entropy")
    def metrics(self, mini: MiniBatch, context: Context) -> Mapping[str, float]:
        """Measure the band before the update, and the share of action tokens outside it."""
        entropies = require_tensor(mini.batch.old_entropies, "old_entropies")
        reference = self.reference(mini.batch, context)
        known = mini.batch.action_mask & ~reference.isnan()
        numbers = {
            "entropy_band/beta": self.weight(context),
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

    def _measured(self, measure: Measure, outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
        reference = self.reference(mini.batch, context)
        known = ~reference.isnan()
        found = measure(outputs.entropies, torch.where(known, reference, 0.0), self.low, self.high)
        return torch.where(known, found, 0.0)

    def _past_mean(self, name: str, present: Mapping[str, float], context: Context) -> float:
        """Average the logged values of a name in the window; NaN if there are too few."""
        now = [present[name]] if name in present else []
        values = [*context.past(name), *now][-self.window :]
        return fmean(values) if len(values) >= self.min_history else math.nan


@requires("entropy")
def entropy_levels(mini: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the mean entropy of every turn index and of trajectories, in nats.

    A turn index is averaged over the trajectories with action tokens in that turn. An `EntropyBand` of later
    steps takes its reference from these metrics.
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
