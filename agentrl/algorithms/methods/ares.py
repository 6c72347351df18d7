"""ARES: a reward for exploring as much as the difficulty of the task asks for."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median, quantiles
from typing import Annotated, ClassVar, NamedTuple

from annotated_types import Interval

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Decay, Weight
from agentrl.data.trajectory import Episode, Group

Window = Annotated[int, Interval(ge=1, le=1000)]


class Difficulty(NamedTuple):
    """How a difficulty shapes the reward.

    Args:
        name: Its name in the log.
        least: The lowest rate of success of the group.
        margin: The part of the target by which a count may miss it.
        bend: The excess above which the penalty is linear.
        width: The width of the sigmoid of the bonus.
        cap: The highest change, in units of `strength`.
        consolation: The part of the bonus that an episode that failed gets.
    """

    name: str
    least: float
    margin: float
    bend: float
    width: float
    cap: float
    consolation: float


EASY = Difficulty("easy", 2 / 3, 0.15, 2.0, 2.0, 1.0, 0.6)
MEDIUM = Difficulty("medium", 1 / 3, 0.25, 3.0, 2.5, 1.0, 0.8)
HARD = Difficulty("hard", 0.0, 0.35, 4.0, 3.0, 1.2, 1.0)


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
        base.kl_coefficient | 0.01  | 0.01     | 0.0

    In the released code the target is the rounded mean of the same batch, so that its controller of the
    strength integrates rounding errors only; ours comes from past steps, at a constant strength. Windows
    count there after 174 words such as "reconsider", from entropies of the ten likeliest tokens; methods do
    not see the text of tokens, so all windows count here. Its factor of the divergence penalty by difficulty
    and its cold start are not reproduced. The released rollout does not branch.

    Args:
        base: The recipe that learns from the reward.
        window: The number of tokens of a window.
        strength: The highest change of the reward of an easy or medium task.
        decay: The decay of the moving averages, per step.

    Source: Chen et al. 2025, arXiv:2510.08457.
    """

    KIND = "rewards"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "grpo", "preset": preset, "kl_coefficient": 0.01}}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    window: Window = 4
    strength: Weight = 0.5
    decay: Decay = 0.99

    def build(self) -> Algorithm:
        """Build the base with the reward."""
        base, reads = self.base.build(), requires("rollout:entropy")
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
        counts: dict[str, list[int]] = {}
        groups = rollout.batch.groups.tolist()
        for group in set(groups):
            members = [each for each, number in zip(episodes, groups, strict=True) if number == group]
            moments = [self.moments(episode, threshold) for episode in members]
            counts.setdefault(difficulty_of(members).name, []).extend(moments)
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


def difficulty_of(episodes: Iterable[Episode]) -> Difficulty:
    """Return the difficulty of a group by its rate of success."""
    rate = fmean([float(episode.success) for episode in episodes])
    return next(level for level in (EASY, MEDIUM, HARD) if rate >= level.least)


def upper_quantile(values: Sequence[float]) -> float:
    """Return the 95 % quantile, interpolated linearly."""
    return quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]


def shaping(level: Difficulty, count: int, target: float, strength: float, *, success: bool) -> float:
    """Return the change of the reward, as `ARES` says."""
    cap, margin, distance = strength * level.cap, max(1.0, level.margin * target), count - target

    def penalty(excess: float) -> float:
        over = max(0.0, excess - margin)
        bent = over * over / (2 * level.bend) if over <= level.bend else over - level.bend / 2
        return cap * min(1.0, bent / (margin + level.bend))

    def bonus(excess: float) -> float:
        return cap / (1 + math.exp(-min(excess, 500 * level.width) / level.width))

    if not success:
        return level.consolation * bonus(max(0.0, distance - margin))
    if level is HARD:
        return bonus(distance + margin) if distance >= -margin else -penalty(-distance) / 2
    return -penalty(distance if level is EASY else abs(distance))
