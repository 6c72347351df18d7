"""HAPO: temperature, advantage and clip of each token by its entropy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
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
    ReplyState,
    TokenTemperature,
    excludes,
    require_tensor,
    requires,
    trait,
)
from agentrl.algorithms.methods.grpo import mark_comparing
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share
from agentrl.data.batch import Batch
from agentrl.errors import ConfigError

LOWEST = 1e-8  # nats, of an entropy before its logarithm
OUTLIER = 5.0  # a group with such an advantage of a token is compared by trajectories
Widening = Annotated[float, Interval(ge=0, le=1)]


@recipe("hapo")
@dataclass(frozen=True)
class HAPO(Recipe):
    """Heterogeneous adaptive policy optimisation: the entropy of a token steers all parts of its update.

        h = (log H - log pivot) / its largest absolute value above, or below, the pivot;   within [-1, 1]
        A      = (R - mean R) / (std R + 1e-6),   over the action tokens of the group
        bounds = [1 - e_low, 1 + e_high],   e_low  = clip (1 - widening h) where h <= 0, else clip,
                                            e_high = clip (1 + widening h) where h > 0, else clip
        A is multiplied by 1 + redistribution h where  h > 0  and the ratio is outside the half-width bounds,
                                                 or    h <= 0 and the ratio is inside them
        temperature of a token = T (1 + temperature_change h)

    H is the entropy before the update, and the pivot its quantile over the rollout batch. The std is that of
    the population; a group with an |A| of 5 or more is compared as in GRPO. The temperature uses pivot and
    range of the step before, and the entropy of the decision before: here a temperature is chosen before the
    distribution is known. Without widening, redistribution and change, `average` trajectory is its base.

        field              | paper    | released | ours
        base.name          | dapo     | dapo     | grpo
        base.preset        | ours     | released | ours
        temperature_change | 0.05     | 0.05     | 0.0
        sign               | intended | released | intended

    The released code divides a level below the pivot by the minimum, which is negative, and so makes it
    positive: certain tokens are then sampled hotter and clipped higher, against the text. We take that for a
    mistake; `sign: released` reproduces it. Our temperature is that of the run, since only the torch engine
    changes it from token to token.

    Args:
        base: The recipe whose advantage and bounds are replaced.
        pivot: The share of the action tokens with a level below 0.
        clip: Half the width of the bounds at level 0.
        widening: By which part of `clip` the bounds widen at level 1 and -1.
        redistribution: The change of the advantage at level 1 and -1.
        temperature_change: The change of the temperature at level 1 and -1.
        average: What is compared within a group: `token` as above; `trajectory` keeps the advantage of the
            base.
        sign: Whether levels below the pivot are negative, `intended`, or positive, `released`.

    Source: Liu et al. 2025, arXiv:2509.16591.
    """

    KIND = "credit"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "dapo"}, "temperature_change": 0.05},
        "released": {"base": {"name": "dapo", "preset": "released"}}
        | {"temperature_change": 0.05, "sign": "released"},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    pivot: Share = 0.8
    clip: Share = 0.2
    widening: Widening = 1.0
    redistribution: Share = 1.0
    temperature_change: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    average: Literal["token", "trajectory"] = "token"
    sign: Literal["intended", "released"] = "intended"

    def build(self) -> Algorithm:
        """Build the base with the parts that follow the level."""
        base, clip = build_clipped(self.base, self.name)
        scale = requires("entropy", *self._ends())
        advantage = base.advantage
        if self.average == "token":
            advantage = mark_comparing(token_average, "zero")
        rollout = base.rollout
        if self.temperature_change:
            if rollout.reply_temperature is not None:
                raise ConfigError(
                    f"hapo: base {self.base.name!r} chooses temperatures as well, wanted temperature_change=0"
                )
            told = requires("rollout:entropy", "rollout:token_temperature")(self.temperature)
            rollout = replace(rollout, reply_temperature=told)
        return replace(
            base,
            advantage=advantage,
            rollout=rollout,
            clip=trait(ADAPTIVE_BOUNDS)(_OF_TOKENS(scale(partial(self.bounds, base=clip)))),
            weights=(*base.weights, _OF_TOKENS(requires("current")(scale(self.redistribute)))),
            diagnostics=(*base.diagnostics, scale(self.metrics)),
        )

    def _ends(self) -> tuple[str, str, str]:
        """Return the names of the lowest entropy, of the pivot and of the highest entropy."""
        return "entropy_quantile:0", f"entropy_quantile:{self.pivot}", "entropy_quantile:1"

    def levels(self, mini: MiniBatch) -> Tensor:
        """Return the level of each token; [B, T] float64."""
        ends = [feature_of(mini, name).double() for name in self._ends()]
        entropies = require_tensor(mini.batch.old_entropies, "old_entropies").double()
        return level(entropies, *ends, released=self.sign == "released")

    def bounds(self, mini: MiniBatch, context: Context, *, base: Clip) -> Bounds:
        """Return bounds that widen with the level, and the dual clip of the base."""
        levels = self.levels(mini)
        low, high = (self.clip * (1 + self.widening * side.clamp(min=0)) for side in (-levels, levels))
        return replace(base(mini, context), lower=1 - low, upper=1 + high)

    def redistribute(self, mini: MiniBatch, context: Context) -> Tensor:
        """Return the factor of each token's advantage."""
        levels = self.levels(mini)
        ratio, bounds = require_tensor(mini.now.ratio, "ratio").double(), mini.bounds
        assert bounds is not None
        inside = ((1 + bounds.lower) / 2 < ratio) & (ratio < (1 + bounds.upper) / 2)
        changed = torch.where(levels > 0, ~inside, inside)
        return torch.where(changed, 1 + self.redistribution * levels, 1.0)

    def temperature(self, state: ReplyState, context: Context) -> TokenTemperature:
        """Return temperatures by the entropy of the decision before, on the scale of the last step."""
        past = [context.past(f"hapo/{name}") for name in ("lowest", "pivot", "highest")]
        if not all(past):
            return TokenTemperature(state.temperature, lambda entropy: state.temperature)
        ends = [torch.tensor(values[-1], dtype=torch.float64) for values in past]

        def following(entropy: float) -> float:
            found = level(torch.tensor(entropy, dtype=torch.float64), *ends, released=self.sign == "released")
            return state.temperature * (1 + self.temperature_change * float(found))

        before = state.previous.action_entropies if state.previous is not None else []
        return TokenTemperature(following(before[-1]) if before else state.temperature, following)

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the entropies at which the level is -1, 0 and 1, in nats."""
        found = [float(feature_of(rollout, name)) for name in self._ends()]
        return dict(zip(("hapo/lowest", "hapo/pivot", "hapo/highest"), found, strict=True))


_OF_TOKENS = excludes(sequence_ratio="its bounds are those of single tokens")


def level(entropies: Tensor, lowest: Tensor, pivot: Tensor, highest: Tensor, *, released: bool) -> Tensor:
    """Return the level of entropies between the given ones, in [-1, 1], of their logarithms."""
    values, low, middle, high = (each.clamp(min=LOWEST).log() for each in (entropies, lowest, pivot, highest))
    above = (values - middle) / torch.where(high > middle, high - middle, 1.0)
    below = (values - middle) / torch.where(low < middle, middle - low, 1.0)
    return torch.where(above > 0, above, -below if released else below).clamp(-1, 1)


@requires("episode_tokens")
def token_average(batch: Batch, context: Context) -> Tensor:
    """Compare returns within the group, each counted once for every action token; [B, T] float64."""
    counts, returns = feature_of(batch, "episode_tokens").double(), batch.returns
    if not len(returns):
        return torch.zeros(batch.tokens.shape, dtype=torch.float64, device=returns.device)
    same = (batch.groups[:, None] == batch.groups).double()
    tokens = (same @ counts).clamp(min=1)
    lowest = torch.where(same > 0, returns, torch.inf).amin(dim=1)
    shifted = same * (returns - lowest[:, None])  # so that equal returns stay at exactly 0
    mean = shifted @ counts / tokens
    variance = (shifted - mean[:, None]).square() * same @ counts / tokens
    values = (returns - lowest - mean) / (variance.sqrt() + 1e-6)
    outlying = same @ ((values.abs() >= OUTLIER) & (counts > 0)).double() > 0
    plain = functional.group_relative_advantage(returns, batch.groups)
    values = torch.where(outlying, plain, values)
    return functional.broadcast_to_tokens(values, batch.trajectory, batch.action_mask)
