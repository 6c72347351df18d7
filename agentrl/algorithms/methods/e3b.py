"""E3B with a global factor: reward for observations that are new in the episode, and new at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.novelty import Across, Combine, Episodic, ObservationNovelty, RandomNetwork
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, range_contradictions, recipe
from agentrl.config import Count, PositiveRate, PositiveWeight, Share, SignedWeight, Weight
from agentrl.data.trajectory import Episode


@recipe("e3b")
@dataclass(frozen=True)
class E3B(Recipe):
    """Episodic and global exploration bonuses: a turn is rewarded for an observation that is new.

        reward = clip(reward + coefficient * b, reward_range),   b = episodic * across,  or their sum
        episodic:  elliptical  h' C^-1 h,  C = ridge I + sum of h h' over the episode so far
                   count       1 if the episode is here for the first time, else 0
        across:    rnd         max(0, e - error_share * e of the observation before),  e = |f(h) - g(h)|
                   count       1 / sqrt(visits in all steps and in this episode)

    b is that of the observation that a turn led to; the first one of an episode gives none. f is a random
    network, and g learns what f says. Counts compare texts in lower case with single spaces, and they and g
    are those of earlier steps, so that all episodes of a step are judged alike. The base's selection of
    groups is left out: where all fail, exploration matters most. With coefficient 0 it is its base.

        field         | paper      | released   | ours
        base.name     | grpo       | grpo       | grpo
        episodic      | elliptical | elliptical | elliptical
        across        | rnd        | rnd        | rnd
        combine       | mult       | mult       | mult
        coefficient   | 1.0        | 1.0        | 0.01
        hidden        | 1024       | 1024       | 256
        divide_by_std | false      | false      | true

    The paper sweeps the coefficient over 0.1, 1 and 10. It learns h by inverse dynamics; ours is a fixed
    projection of hashed words and pairs of words to length 1, see `text_features`, since rewards are shaped
    before the policy's hidden states are computed. The paper's learner is not one of groups.

    Args:
        base: The recipe whose rewards are shaped.
        episodic: The factor of the episode alone.
        across: The factor of all steps.
        combine: Whether the factors are multiplied or added.
        coefficient: The weight of the bonus, in reward units.
        ridge: The regularisation of `elliptical`.
        error_share: The share of the error of the observation before, which `rnd` subtracts.
        hidden: The width of the networks of `rnd`.
        learning_rate: That of g.
        gradient_steps: The gradient steps of g in each training step.
        divide_by_std: Whether b is divided by the std of all bonuses of earlier steps. The first step then
            gives no bonus.
        reward_range: The least and the largest reward of a turn.

    Source: Henaff et al. 2023, arXiv:2306.03236.
    """

    KIND = "exploration"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        preset: {"coefficient": 1.0, "hidden": 1024, "divide_by_std": False}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    episodic: Episodic = "elliptical"
    across: Across = "rnd"
    combine: Combine = "mult"
    coefficient: Weight = 0.01
    ridge: PositiveWeight = 0.1
    error_share: Share = 0.1
    hidden: Count = 256
    learning_rate: PositiveRate = 1e-3
    gradient_steps: Count = 4
    divide_by_std: bool = True
    reward_range: tuple[SignedWeight, SignedWeight] = (-1.0, 1.0)

    def build(self) -> Algorithm:
        """Build the base with the shaped rewards."""
        base = self.base.build()
        network = None
        if self.across == "rnd":
            network = RandomNetwork(self.hidden, self.learning_rate, self.gradient_steps)
        novelty = ObservationNovelty(
            self.episodic,
            self.across,
            self.combine,
            ridge=self.ridge,
            share=self.error_share,
            divide_by_std=self.divide_by_std,
            network=network,
        )
        return replace(
            base,
            select=keep_all,
            shape_reward=(*base.shape_reward, partial(self.shape, novelty=novelty)),
            diagnostics=(*base.diagnostics, partial(novelty_metrics, novelty=novelty)),
        )

    def shape(self, episode: Episode, context: Context, *, novelty: ObservationNovelty) -> Sequence[float]:
        """Add the bonus to the reward of each turn."""
        rewards = [turn.reward for turn in episode.turns]
        if not self.coefficient:
            return rewards
        low, high = self.reward_range
        return [
            min(max(reward + self.coefficient * bonus, low), high)
            for reward, bonus in zip(rewards, novelty.bonuses(episode).tolist(), strict=True)
        ]

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            (
                self.episodic == "none" and self.across == "none",
                "episodic and across are both 'none', wanted at least one factor of the bonus",
            ),
            *range_contradictions(self, "reward_range"),
        ]


def novelty_metrics(
    rollout: MiniBatch, context: Context, *, novelty: ObservationNovelty
) -> Mapping[str, float]:
    """Return the mean bonus of a turn, the error of `rnd` before it learned, and the number of states."""
    return {f"e3b/{name}": value for name, value in novelty.metrics.items()}
