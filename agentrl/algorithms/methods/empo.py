"""EMPO: the reward of an answer is how many of its group give it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.answers import Answer, answer_of, cluster_answers
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.data.trajectory import Group


@recipe("empo")
@dataclass(frozen=True)
class EMPO(Recipe):
    """Entropy-minimised policy optimisation: no reward from outside, but the agreement of the group.

        R = (episodes of the group with the same answer) / (episodes of the group),   0 without an answer

    If all answers of a group differ, all rewards are 0. It replaces the reward of the environment, which is
    neither read nor needed, and minimises the entropy of the answers: a wrong majority is rewarded as well.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0

    The released code clusters answers that a checker takes for equal; the variant for verl has no filter of
    groups, and runs over GSPO with groups of 16.

    Args:
        base: The recipe that learns from the rewards. Its selection of groups by rewards is left out.
        answers: What is compared: see `answer_clusters`.

    Source: Zhang et al. 2025, arXiv:2504.05812.
    """

    KIND = "rewards"
    CONFIDENCE = "official code read"

    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0}},
        "released": {"base": {"name": "grpo", "preset": "released", "kl_coefficient": 0.0}},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    answers: Answer = "normalised"

    def build(self) -> Algorithm:
        """Build the base with the reward of agreement."""
        base = self.base.build()
        return replace(
            base,
            select=keep_all,
            shape_reward=(),
            shape_group=(partial(agreement, by=self.answers),),
            diagnostics=(*base.diagnostics, agreement_metrics),
        )


def agreement(group: Group, context: Context, *, by: Answer) -> Sequence[Sequence[float]]:
    """Return the share of the group with the answer of an episode, as the reward of its last turn."""
    episodes = group.episodes
    clusters = cluster_answers(episodes, [0] * len(episodes), by)
    counts = Counter(clusters)
    apart = len(counts) == len(episodes)
    shares = [
        0.0 if apart or not answer_of(episode, by) else counts[cluster] / len(episodes)
        for episode, cluster in zip(episodes, clusters, strict=True)
    ]
    return [
        [0.0] * (len(episode.turns) - 1) + [share] * bool(episode.turns)
        for episode, share in zip(episodes, shares, strict=True)
    ]


def agreement_metrics(rollout: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the mean reward of agreement over episodes."""
    returns = rollout.batch.returns
    return {"empo/agreement": float(returns.mean())} if len(returns) else {}
