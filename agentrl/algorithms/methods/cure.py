"""CURE: branches from a critical word of each first rollout, and plain DAPO later on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

from annotated_types import Interval
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.branching import BranchPolicy, own_rollout
from agentrl.algorithms.features import branch_states, own_tokens
from agentrl.algorithms.hooks import BRANCHES, Context, MiniBatch, requires, trait
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.algorithms.tree_policies import FromTheStart, Trees, critical_point
from agentrl.config import Steps


@recipe("cure")
@dataclass(frozen=True)
class CURE(Recipe):
    """Critical-token re-generation: every first rollout is left before an uncertain word, and goes on anew.

        episodes of a task = rollouts + rollouts * branches,   all in one group

    When the first rollouts of a task have ended, one of the `top_k` least certain words of each is drawn with
    the seed. Branches start right before it, in the state of the environment at that turn and with the reply
    up to that word, so that the word itself is sampled again. A word is an action token of at least two
    characters; the first action token of an episode and special tokens are none. A rollout without a word, or
    an aborted one, has branches from the first observation. A branch is learned from after its branch point
    only. From `second_stage` on, all episodes start at the first observation, as many as before: then it is
    its base. A group has 16 episodes, as many as GRPO plays with rollout.group_size=16.

        field            | paper | released | ours
        base.name        | dapo  | dapo     | dapo
        base.preset      | ours  | ours     | ours
        base.max_rounds  | 10    | 10       | 3

    The released code cuts the head of a sequence off where branches do not fit the context; here such an
    episode ends at the limit, as all do. Its batches are of 512 tasks, its temperature is 1.

    Args:
        base: The recipe whose rollouts branch.
        rollouts: n1, the number of first rollouts of a task.
        branches: n2, the number of branches from each.
        top_k: The number of words with the highest entropies that the critical one is drawn from.
        second_stage: The step from which nothing branches; null branches in all steps.

    Source: Li et al. 2025, arXiv:2508.11016.
    """

    KIND = "rollouts"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"base": {"name": "dapo", "max_rounds": 10}},
        "released": {"base": {"name": "dapo", "max_rounds": 10}},
    }

    base: Base = field(default_factory=lambda: build_recipe("dapo"))
    rollouts: Annotated[int, Interval(ge=1, le=10_000)] = 4
    branches: Annotated[int, Interval(ge=1, le=10_000)] = 3
    top_k: Annotated[int, Interval(ge=1, le=10_000)] = 20
    second_stage: Steps | None = 300

    def build(self) -> Algorithm:
        """Build the base with branches."""
        base = self.base.build()
        rollout = own_rollout(
            base.rollout,
            self.name,
            episodes=functional.tree_episodes(self.rollouts, 1, self.branches),
            branch_policy=trait(BRANCHES)(requires("rollout:entropy")(self.branch_policy)),
        )
        return replace(
            base,
            rollout=rollout,
            masks=(*base.masks, from_the_branch_on),
            diagnostics=(*base.diagnostics, branch_metrics),
        )

    def branch_policy(self, episodes: int, seed: int, context: Context) -> BranchPolicy:
        """Return what decides where the episodes of a task start in this step."""
        if self.second_stage is not None and context.step >= self.second_stage:
            return FromTheStart(episodes, seed, context)
        choose = partial(critical_point, among=self.top_k)
        return Trees(episodes, seed, context, trunks=self.rollouts, branches=self.branches, points=choose)


def from_the_branch_on(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the action tokens that a trajectory sampled itself; [B, T] bool."""
    return own_tokens(mini.batch)


def branch_metrics(rollout: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the share of the branches among episodes, and of the action tokens that each sampled itself."""
    batch = rollout.batch
    if not len(batch.episodes):
        return {}
    found = branch_states(batch)
    own = int(own_tokens(batch).sum()) / max(1, int(batch.action_mask.sum()))
    return {"trees/branches": float((found.member >= 0).double().mean()), "trees/own_tokens": own}
