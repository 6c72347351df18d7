"""ETTRL: trees from uncertain points, advantages by entropy, and the answer of the majority as the label."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.answers import Answer, answer_of
from agentrl.algorithms.branching import AnchorUnit, anchor_points, own_rollout
from agentrl.algorithms.hooks import Context, requires
from agentrl.algorithms.methods.cure import branch_metrics, from_the_branch_on
from agentrl.algorithms.methods.dr_bot import by_shaped_returns
from agentrl.algorithms.named_features import feature_of
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.algorithms.tree_policies import Trees
from agentrl.config import OptionalCount
from agentrl.data.batch import Batch
from agentrl.data.trajectory import BranchPoint, Episode, Group

BY_ENTROPY = ("episode_entropy", "group_entropy")


@recipe("ettrl")
@dataclass(frozen=True)
class ETTRL(Recipe):
    """Entropy-based test-time RL: trees that fork where the policy is unsure, and calmer advantages.

        episodes of a task = trees * (1 + branches * points)
        Y  = max(0, 1 + (mean H - H) / mean H),   H the mean entropy of an episode's action tokens
        A' = Y A   (advantage: entropy),   clip(A, -limit, limit)   (advantage: clip)

    The first rollout of each tree is played to its end. At each of its `points` least certain points,
    `branches` others start, and sample the token again. The mean of H is over the group. Both advantages hold
    back the large ones of uncertain episodes, from which a wrong label would be learned. A branch is learned
    from after its branch point only, so that each token is learned from once. The sampled tokens are, for
    forks anywhere alike, (1 + BN / 2) / (1 + BN) of those of as many whole episodes. GRPO plays as many
    episodes with rollout.group_size=10, and with 60 for the paper's trees.

    With reward: majority, the reward of an episode is 1 if it gives the most frequent answer of its group,
    else 0; of equally frequent ones, the first episode's counts. The environment's reward is not read then.

        field     | paper    | released | ours
        trees     | 12       | 12       | 2
        reward    | majority | majority | environment

    This is a reconstruction: there is no released code, and `released` has the paper's values. The paper
    compares its 60 leaves with 64 plain rollouts. Y is not limited in it; below 0 it would turn signs.

    Args:
        base: The recipe whose rollouts, rewards and advantages are changed.
        trees: M, the number of first rollouts of a task.
        points: N, the number of points at which each of them forks.
        branches: B, the number of branches from a point.
        anchor: `token` for points before tokens, `turn` for points before turns; `auto` takes turns if the
            rollout has more than one.
        advantage: `entropy`, `clip` or `plain`, see above.
        limit: The largest size of an advantage with `clip`.
        reward: `environment`, or `majority`.
        answers: What is compared for the majority: see `answer_clusters`.

    Source: Liu et al. 2025, arXiv:2508.11356.
    """

    KIND = "rollouts"
    CONFIDENCE = "reconstruction"
    PRESETS: ClassVar[Presets] = {
        "paper": {"trees": 12, "reward": "majority"},
        "released": {"trees": 12, "reward": "majority"},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    trees: Annotated[int, Interval(ge=1, le=10_000)] = 2
    points: OptionalCount = 2
    branches: Annotated[int, Interval(ge=1, le=10_000)] = 2
    anchor: AnchorUnit = "auto"
    advantage: Literal["entropy", "clip", "plain"] = "entropy"
    limit: Annotated[float, Interval(gt=0, le=1e6)] = 2.0
    reward: Literal["environment", "majority"] = "environment"
    answers: Answer = "normalised"

    def build(self) -> Algorithm:
        """Build the base with trees, and with the chosen reward and advantage."""
        base = self.base.build()
        points = partial(uncertain_points, count=self.points, unit=self.anchor)
        rollout = own_rollout(
            base.rollout,
            self.name,
            episodes=functional.tree_episodes(self.trees, self.points, self.branches),
            branch_policy=partial(Trees, trunks=self.trees, branches=self.branches, points=points),
        )
        changes: dict[str, Any] = {}
        if self.reward == "majority":
            vote = partial(majority_reward, by=self.answers)
            select = by_shaped_returns(base.select, (), (vote,))
            changes = {"select": select, "shape_reward": (), "shape_group": (vote,)}
        if self.advantage != "plain":
            own = reshape_by_entropy if self.advantage == "entropy" else partial(limited, limit=self.limit)
            changes["transforms"] = (*base.transforms, own)
        return replace(
            base,
            rollout=rollout,
            masks=(*base.masks, from_the_branch_on),
            diagnostics=(*base.diagnostics, branch_metrics),
            **changes,
        )


def uncertain_points(
    trunk: Episode, seed: int, context: Context, *, count: int, unit: AnchorUnit
) -> Sequence[BranchPoint]:
    """Return the `count` least certain points of an episode; `seed` and `context` are not read."""
    return anchor_points(trunk, count, unit=unit)


def majority_reward(group: Group, context: Context, *, by: Answer) -> Sequence[Sequence[float]]:
    """Return 1 for the last turn of the episodes with the most frequent answer, and 0 for all other turns."""
    answers = [answer_of(episode, by) for episode in group.episodes]
    # Of equally frequent answers, `most_common` returns the one seen first.
    label = next((answer for answer, _ in Counter(filter(None, answers)).most_common(1)), None)
    return [
        [0.0] * (len(episode.turns) - 1) + [float(answer == label)] * bool(episode.turns)
        for episode, answer in zip(group.episodes, answers, strict=True)
    ]


@requires(*BY_ENTROPY)
def reshape_by_entropy(advantages: Tensor, batch: Batch, context: Context) -> Tensor:
    """Multiply advantages by `functional.relative_certainty` of their episode; [B, T]."""
    factors = functional.relative_certainty(*(feature_of(batch, name) for name in BY_ENTROPY))
    return advantages * factors[batch.trajectory][:, None]


def limited(advantages: Tensor, batch: Batch, context: Context, *, limit: float) -> Tensor:
    """Clip advantages to +-limit; [B, T]."""
    return advantages.clamp(-limit, limit)
