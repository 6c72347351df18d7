"""Dr.BoT: a bag of tricks for group-relative training of agents."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import pstdev
from typing import ClassVar

import torch
from torch import Tensor

from agentrl.algorithms import functional
from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.clipped_recipe import build_clipped
from agentrl.algorithms.credit import shape_rewards
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.hooks import (
    Bounds,
    Context,
    MiniBatch,
    Select,
    ShapeGroup,
    ShapeReward,
    excludes,
    trait,
)
from agentrl.algorithms.methods.grpo import GRPO
from agentrl.algorithms.recipe import Base, Presets, Recipe, recipe
from agentrl.config import PositiveShare, Share, Tokens, Weight
from agentrl.data.batch import Batch
from agentrl.data.trajectory import Group, Turn

NGRAM, REPEATS = 20, 10  # a reply is repetitive if it has the same 20 tokens 10 times
SHAPED = "selection by shaped returns"
FAULTS = ("overlong", "incomplete", "repetitive", "unreadable")


@recipe("dr_bot")
@dataclass(frozen=True)
class DrBot(Recipe):
    """Dr.BoT: centred returns, a higher upper clip, a constant length, and no learning from bad replies.

        loss = mean over sequences of (sum over tokens of the clipped surrogate / sequence_length)

    It takes the advantage and the terms of `base`, and uses its own clip, aggregation and selection of
    groups. Faulty replies stay in the returns and baselines, but are left out of the loss and of its
    normaliser. A reply is faulty if it was cut off at the token limit (overlong), has no valid action
    (incomplete), repeats the same 20 tokens 10 times (repetitive), or has an action with undecodable
    characters (unreadable). Groups are selected by the variation of their shaped returns.

        field              | paper | released | ours
        base.name          | grpo  | grpo     | grpo
        base.preset        | ours  | released | ours
        base.divide_by_std | false | false    | false
        sequence           | turn  | turn     | trajectory
        sequence_length    | 512   | 512      | 32

    512 is the maximum length of a reply in the published runs on text games (4096 in mathematics); 32 suits
    short commands. The released code divides by the width of the padding instead, which is not reproduced.

    Args:
        base: The recipe that provides the advantage and the terms.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        sequence: The unit to average over after dividing by the length; the published runs use turns.
        sequence_length: The constant divisor of the sum over a sequence, in action tokens.
        keep_groups: The share of a round's groups to keep, rounded up: those whose returns vary most.

    Source: Qin et al. 2025, arXiv:2509.22601.
    """

    KIND = "token selection"
    CONFIDENCE = "official code read"
    PRESETS: ClassVar[Presets] = {
        "paper": {"sequence": "turn", "sequence_length": 512},
        "released": {
            "base": {"name": "grpo", "preset": "released", "divide_by_std": False},
            "sequence": "turn",
            "sequence_length": 512,
        },
    }

    base: Base = field(default_factory=lambda: GRPO(divide_by_std=False))
    clip_low: Share = 0.2
    clip_high: Weight = 0.28
    sequence: functional.Unit = "trajectory"
    sequence_length: Tokens = 32
    keep_groups: PositiveShare = 0.75

    def build(self) -> Algorithm:
        """Build the base with the changes of Dr.BoT."""
        base, _ = build_clipped(self.base, self.name)
        return replace(
            base,
            select=by_shaped_returns(
                partial(keep_most_varied, share=self.keep_groups), base.shape_reward, base.shape_group
            ),
            masks=(*base.masks, without_faults),
            clip=partial(token_clip, low=self.clip_low, high=self.clip_high),
            aggregation=partial(
                functional.constant_weights, length=self.sequence_length, sequence=self.sequence
            ),
            diagnostics=(*base.diagnostics, fault_metrics),
        )


@excludes(sequence_ratio="its bounds are those of single tokens; gspo over dr_bot keeps the bounds of gspo")
def token_clip(mini: MiniBatch, context: Context, *, low: float, high: float) -> Bounds:
    """Bound the ratio of every token to [1 - low, 1 + high], without a dual clip."""
    return Bounds(1 - low, 1 + high)


def by_shaped_returns(
    select: Select, shapers: Sequence[ShapeReward], group_shapers: Sequence[ShapeGroup] = ()
) -> Select:
    """Return a selection that sees shaped returns. Recipes that add a shaper must add it here, too."""
    return trait(SHAPED)(partial(select_shaped, select=select, shapers=shapers, group_shapers=group_shapers))


def select_shaped(
    groups: Sequence[Group],
    context: Context,
    *,
    select: Select,
    shapers: Sequence[ShapeReward],
    group_shapers: Sequence[ShapeGroup] = (),
) -> Sequence[Group]:
    """Select groups by their shaped returns; the groups returned are the unshaped ones."""
    played = {(group.task, episode.id): episode for group in groups for episode in group.episodes}
    seen = shape_rewards(groups, context, shapers, group_shapers)
    return [
        replace(group, episodes=tuple(played[group.task, episode.id] for episode in group.episodes))
        for group in select(seen, context)
    ]


def keep_most_varied(groups: Sequence[Group], context: Context, *, share: float) -> Sequence[Group]:
    """Keep ceil(share * groups) of the groups, in their order: those with the largest deviation of returns.

    The deviation is that of the population; ties go to the earlier group. Groups without a finished episode
    are left out first.
    """
    played = [group for group in groups if group.finished]
    # Rounded, so that the result does not depend on floating-point noise.
    spreads = [round(pstdev(episode.episode_return for episode in group.finished), 9) for group in played]
    most = sorted(range(len(played)), key=lambda index: -spreads[index])
    return [played[index] for index in sorted(most[: math.ceil(round(share * len(played), 9))])]


def fault(turn: Turn) -> str | None:
    """Return the fault of a reply, one of `FAULTS`, or None if the reply can be learned from."""
    if turn.finish == "length":
        return "overlong"
    if not turn.valid:
        return "incomplete"
    if _repeats(turn.action_ids):
        return "repetitive"
    return "unreadable" if "\N{REPLACEMENT CHARACTER}" in turn.action else None


def without_faults(mini: MiniBatch, context: Context) -> Tensor:
    """Mark the action tokens of replies without a fault; [B, T] bool."""
    batch = mini.batch
    found = _faults(batch)
    turns = max(map(len, found.values()), default=0)
    table = torch.zeros(len(batch.episodes), turns)
    for owner, row in found.items():
        table[owner, : len(row)] = torch.tensor([reason is None for reason in row], dtype=table.dtype)
    good = table.to(batch.tokens.device)
    return turns_to_tokens(good, batch) > 0


def fault_metrics(rollout: MiniBatch, context: Context) -> Mapping[str, float]:
    """Return the share of replies with each fault. A reply counts for its first fault."""
    reasons = [reason for row in _faults(rollout.batch).values() for reason in row]
    counts = Counter(reasons)
    return {f"replies_{name}": counts[name] / max(1, len(reasons)) for name in FAULTS}


def _faults(batch: Batch) -> dict[int, list[str | None]]:
    """Return the fault of every reply, by trajectory; trajectories without a row are left out."""
    return {
        owner: [fault(turn) for turn in batch.episodes[owner].turns]
        for owner in set(batch.trajectory.tolist())
    }


def _repeats(ids: Sequence[int]) -> bool:
    if len(ids) < NGRAM + REPEATS - 1:
        return False
    counts = Counter(zip(*(ids[start:] for start in range(NGRAM)), strict=False))
    return max(counts.values()) >= REPEATS
