"""PEAR: a correct episode is worth less, the less certain its reasoning was."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.features import thoughts_of
from agentrl.algorithms.hooks import Context, requires
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import SignedWeight, Weight
from agentrl.data.trajectory import Episode, Turn


@recipe("pear")
@dataclass(frozen=True)
class PEAR(Recipe):
    """Phase-entropy-aware reward: long, hesitating reasoning costs part of the reward of success.

        penalty = max(0, mean entropy of the reasoning - alpha * mean entropy of the choice)
        R       = min(1, success_reward - penalty) of an episode that succeeded, else failure_reward

    Means are over the action tokens of a turn and then over turns; the rollout records the entropies. The
    reasoning is what `policy.reply=think_action` writes before a choice; a reply that is no such choice
    counts as reasoning, and the tags around it do not count. R replaces the reward of the environment.

        field                  | paper | released | ours
        base.name              | grpo  | grpo     | grpo
        base.preset            | paper | paper    | ours
        base.kl_coefficient    | 0.0   | 0.0      | 0.0
        base.drop_equal_groups | false | false    | false

    The formula is from two summaries of the paper; its code was not read, and `released` has the same values.
    The text has rewards in [0, 1]; a penalty above 1 makes R negative here.

    Args:
        base: The recipe that learns from the reward. One that drops groups with equal rewards of the
            environment also drops those in which all succeed.
        alpha: The weight of the entropy of the choice.
        success_reward: The reward of success without a penalty.
        failure_reward: The reward of an episode that failed.

    Source: Huang et al. 2025, arXiv:2510.08026.
    """

    KIND = "rewards"
    CONFIDENCE = "reconstruction"

    PRESETS: ClassVar[Presets] = {
        preset: {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}}
        for preset in ("paper", "released")
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo", {"drop_equal_groups": False}))
    alpha: Weight = 1.0
    success_reward: Weight = 1.0
    failure_reward: SignedWeight = 0.0

    def build(self) -> Algorithm:
        """Build the base with the reward."""
        base = self.base.build()
        return replace(base, shape_reward=(*base.shape_reward, requires("rollout:entropy")(self.reward)))

    def reward(self, episode: Episode, context: Context) -> Sequence[float]:
        """Return the reward at the last turn, 0 before it."""
        value = self.failure_reward
        if episode.success:
            value = min(1.0, self.success_reward - self.penalty(episode))
        return [0.0] * (len(episode.turns) - 1) + [value] * bool(episode.turns)

    def penalty(self, episode: Episode) -> float:
        """Return by how much the reasoning was less certain than the choices, in nats."""
        reasoning, choosing = (
            [fmean(values) for turn in episode.turns if (values := phase_entropies(turn, thought=thought))]
            for thought in (True, False)
        )
        mean = fmean(reasoning) if reasoning else 0.0
        return max(0.0, mean - self.alpha * (fmean(choosing) if choosing else 0.0))


def phase_entropies(turn: Turn, *, thought: bool) -> list[float]:
    """Return the entropies of the action tokens of a turn's reasoning, or of its choice."""
    phases = thoughts_of(turn) if turn.allowed is not None else [True] * len(turn.action_entropies)
    return [
        entropy for entropy, phase in zip(turn.action_entropies, phases, strict=False) if phase == thought
    ]
