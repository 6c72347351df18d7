"""ARES: a reward for exploring as much as the difficulty of the task asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median, quantiles
from typing import Annotated, ClassVar

from annotated_types import Interval

from agentrl.algorithms.adaptive_kl import AdaptiveKL
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import kl_to_reference
from agentrl.algorithms.difficulty import LEVELS, difficulty_of, levels_of, shaping
from agentrl.algorithms.hooks import Context, MiniBatch, Term, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Decay, Weight
from agentrl.data.trajectory import Episode, Group

Window = Annotated[int, Interval(ge=1, le=1000)]


@recipe("ares")
@dataclass(frozen=True)
class ARES(Recipe):
    """ARES: uncertain moments are counted, and their number is rewarded on hard tasks, not on easy ones.

        moment = a window of `window` tokens of a reply with a mean entropy of at least the threshold
        R = return of the environment + e,   by d = moments - target of the difficulty
        easy:    success  -penalty(d)     failure  +0.6 bonus(d)
        medium:  success  -penalty(|d|)   failure  +0.8 bonus(d)
        hard:    success  +sigmoid((d + margin) / width) cap, or -penalty(-d) / 2 where d < -margin
                 failure  +bonus(d)
        penalty(d) = cap min(1, huber(max(0, d - margin)) / (margin + bend))
        bonus(d)   = cap sigmoid(max(0, d - margin) / width)

    A group is easy if at least 2/3 of its episodes succeed, and hard if fewer than 1/3 do. The threshold is a
    moving average of the median over episodes of the 95 % quantile of their windows, and the target one of
    the mean count, both over the steps before; until they are known e is 0. With strength 0 it is its base.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0
        kl_coefficient      | 0.01  | 0.01     | 0.0

    In the released code the target is the rounded mean of the same batch, so that its controller of the
    strength integrates rounding errors only; ours comes from past steps, at a constant strength. Windows
    count there after 174 words such as "reconsider", from entropies of the ten likeliest tokens; methods do
    not see the text of tokens, so all windows count here. It moves the factors of the divergence every 100
    micro-batches, we once a step. Its cold start is not reproduced, and its rollout does not branch.

    Args:
        base: The recipe that learns from the reward.
        window: The number of tokens of a window.
        strength: The highest change of the reward of an easy or medium task.
        decay: The decay of the moving averages, per step.
        kl_coefficient: The coefficient of the divergence from the reference, times a factor by difficulty
            that leads it to 0.01 nats; see `AdaptiveKL`.

    Source: Chen et al. 2025, arXiv:2510.08457.
    """

    KIND = "rewards"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "grpo", "preset": preset, "kl_coefficient": 0.0}, "kl_coefficient": 0.01}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    window: Window = 4
    strength: Weight = 0.5
    decay: Decay = 0.99
    kl_coefficient: Weight = 0.0

    def build(self) -> Algorithm:
        """Build the base with the reward."""
        base, reads = self.base.build(), requires("rollout:entropy")
        if self.kl_coefficient:
            held = AdaptiveKL("ares_kl", [level.name for level in LEVELS], levels_of)
            term = Term("ares_kl", kl_to_reference, self.kl_coefficient, where=held.weights)
            metrics = (*base.diagnostics, held.metrics)
            base = replace(base, terms=(*base.terms, term), diagnostics=metrics)
        return replace(
            base,
            shape_group=(*base.shape_group, reads(self.reward)),
            diagnostics=(*base.diagnostics, reads(self.metrics)),
        )

    def reward(self, group: Group, context: Context) -> Sequence[Sequence[float]]:
        """Return the rewards with the change at the last turn."""
        level = difficulty_of(group.episodes)
        threshold, target = latest(context, "threshold"), latest(context, f"target/{level.name}")
        rewards = [[turn.reward for turn in episode.turns] for episode in group.episodes]
        if threshold is None or target is None:
            return rewards
        for episode, given in zip(group.episodes, rewards, strict=True):
            if given:
                count = self.moments(episode, threshold)
                given[-1] += shaping(level, count, target, self.strength, success=episode.success)
        return rewards

    def moments(self, episode: Episode, threshold: float) -> int:
        """Return the number of uncertain moments of an episode."""
        return sum(mean >= threshold for mean in self.windows(episode))

    def windows(self, episode: Episode) -> list[float]:
        """Return the mean entropy of the windows that follow a token of a reply, in nats."""
        return [
            fmean(values[first : first + self.window])
            for turn in episode.turns
            for values in [turn.action_entropies]
            for first in range(1, len(values) - self.window + 1)
        ]

    def metrics(self, rollout: MiniBatch, context: Context) -> Mapping[str, float]:
        """Return the threshold and the targets of the next step, and the mean count of moments."""
        episodes = rollout.batch.episodes
        peaks = [upper_quantile(found) for episode in episodes if (found := self.windows(episode))]
        numbers = {"ares/threshold": self._moved(context, "threshold", median(peaks))} if peaks else {}
        threshold = latest(context, "threshold")
        if threshold is None:
            return numbers
        counts: dict[str, list[float]] = {}
        for episode, index in zip(episodes, levels_of(rollout.batch), strict=True):
            counts.setdefault(LEVELS[index].name, []).append(self.moments(episode, threshold))
        for name, values in counts.items():
            numbers[f"ares/target/{name}"] = self._moved(context, f"target/{name}", fmean(values))
        return numbers

    def _moved(self, context: Context, name: str, value: float) -> float:
        before = latest(context, name)
        return value if before is None else self.decay * before + (1 - self.decay) * value


def latest(context: Context, name: str) -> float | None:
    """Return the last value of a metric of the method, None before the first."""
    past = context.past(f"ares/{name}")
    return past[-1] if past else None


def upper_quantile(values: Sequence[float]) -> float:
    """Return the 95 % quantile, interpolated linearly."""
    return quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]
