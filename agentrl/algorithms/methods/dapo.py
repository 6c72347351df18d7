"""DAPO: four changes to any recipe with a clipped ratio."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm, drop_equal_returns
from agentrl.algorithms.clipped_recipe import build_clipped
from agentrl.algorithms.hooks import Bounds, Clip, Context, MiniBatch, Select, excludes, traits
from agentrl.algorithms.methods.dr_bot import SHAPED, by_shaped_returns
from agentrl.algorithms.methods.ragen import refuse_second_filter
from agentrl.algorithms.recipe import Base, Presets, Recipe, build_recipe, recipe
from agentrl.config import Share, Tokens, Weight
from agentrl.data.trajectory import Episode, Group


@recipe("dapo")
@dataclass(frozen=True)
class DAPO(Recipe):
    """Decoupled clip and dynamic sampling: a wider upper bound, only groups that differ, the token mean.

        loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    Tasks are drawn and played in rounds until enough groups have different returns. Returns are compared
    before any penalty; a base that selects by shaped returns then sees the penalties. With equal bounds it is
    its base with dynamic sampling and the token mean.

        field               | paper | released | ours
        base.name           | grpo  | grpo     | grpo
        base.preset         | paper | released | ours
        base.kl_coefficient | 0.0   | 0.0      | 0.0
        max_rounds          | 10    | 10       | 3
        overlong_limit      | 20480 | null     | null
        overlong_cache      | 4096  | 0        | 0

    The paper draws tasks until the batch is full; 10 rounds stand in for that. Its lengths are those of long
    mathematics, its groups are of 16. The released code is verl-agent, without the overlong penalty.

    Args:
        base: The recipe that provides the advantage, rewards, terms and dual clip.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        max_rounds: The maximum number of rounds until enough groups differ (10 in verl-agent).
        overlong_limit: An episode with more reply tokens than this loses 1 of its last reward; null for no
            penalty.
        overlong_cache: The number of tokens before the limit over which that penalty grows.

    Source: Yu et al. 2025, arXiv:2503.14476.
    """

    KIND = "clipping"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {
            "base": {"name": "grpo", "preset": "paper", "kl_coefficient": 0.0},
            "max_rounds": 10,
            "overlong_limit": 20480,
            "overlong_cache": 4096,
        },
        "released": {"base": {"name": "grpo", "preset": "released"}, "max_rounds": 10},
    }

    base: Base = field(default_factory=lambda: build_recipe("grpo"))
    clip_low: Share = 0.2
    clip_high: Weight = 0.28
    max_rounds: Annotated[int, Interval(ge=1, le=1000)] = 3
    overlong_limit: Tokens | None = None
    overlong_cache: Annotated[int, Interval(ge=0, le=2**30)] = 0

    def build(self) -> Algorithm:
        """Build the base with the changes of DAPO."""
        base, clip = build_clipped(self.base, self.name)
        select, shape_reward = base.select, base.shape_reward
        refuse_second_filter(select, self.name)
        if self.overlong_limit is not None:
            penalty = partial(penalise_overlong, limit=self.overlong_limit, cache=self.overlong_cache)
            shape_reward = (*shape_reward, penalty)
            if SHAPED in traits(select):
                select = by_shaped_returns(select, (penalty,))
        return replace(
            base,
            select=partial(drop_equal_then, select=select),
            rollout=replace(base.rollout, rounds=self.max_rounds),
            shape_reward=shape_reward,
            clip=partial(clip_higher, low=self.clip_low, high=self.clip_high, base=clip),
            aggregation=functional.token_weights,
        )

    def _contradictions(self) -> Sequence[tuple[bool, str]]:
        return [
            *super()._contradictions(),
            (
                self.overlong_limit is not None and not 0 < self.overlong_cache <= self.overlong_limit,
                f"overlong_cache is {self.overlong_cache}, wanted above 0 and at most overlong_limit",
            ),
        ]


def drop_equal_then(groups: Sequence[Group], context: Context, *, select: Select) -> Sequence[Group]:
    """Drop the groups with equal returns, then apply another selection."""
    return select(drop_equal_returns(groups, context), context)


@excludes(sequence_ratio="its bounds are those of single tokens; gspo over dapo keeps the bounds of gspo")
def clip_higher(mini: MiniBatch, context: Context, *, low: float, high: float, base: Clip) -> Bounds:
    """Bound the ratio of every token to [1 - low, 1 + high]; keep the dual clip of the base."""
    return replace(base(mini, context), lower=1 - low, upper=1 + high)


def penalise_overlong(episode: Episode, context: Context, *, limit: int, cache: int) -> Sequence[float]:
    """Return the rewards, with the overlong penalty of all reply tokens on the last one."""
    rewards = [turn.reward for turn in episode.turns]
    length = torch.tensor(sum(len(turn.action_ids) for turn in episode.turns))
    if rewards:
        rewards[-1] += float(functional.overlong_penalty(length, limit, cache))
    return rewards
