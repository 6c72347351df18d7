"""Advantages of tokens from episodes: the part of an algorithm that runs before the updates."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import (
    Context,
    MiniBatch,
    ShapeReward,
)
from agentrl.data.batch import Batch, Layout, collate
from agentrl.data.trajectory import Episode, Group


def prepare(
    algorithm: Algorithm,
    groups: Sequence[Group],
    context: Context,
    *,
    layout: Layout = "trajectory",
    selected: bool = False,
) -> Batch:
    """Turn a step's groups into a batch: select (unless `selected`), shape rewards, collate.

    Selection sees the environment's rewards. The batch and its episodes hold the shaped ones.
    """
    kept = groups if selected else algorithm.select(groups, context)
    for shape in algorithm.shape_reward:
        kept = [
            replace(
                group, episodes=tuple(shape_episode(episode, shape, context) for episode in group.episodes)
            )
            for group in kept
        ]
    return collate(kept, layout=layout)


def compute_advantages(algorithm: Algorithm, batch: Batch, context: Context) -> Tensor:
    """Return the transformed advantages of the whole rollout batch; [B, T], no gradient, 0 where not sampled.

    Raises:
        ValueError: If a hook returns another shape; names the hook.
    """
    with torch.no_grad():
        advantages = _checked("advantage", algorithm.advantage(batch, context), batch)
        for transform in algorithm.transforms:
            advantages = _checked("transforms", transform(advantages, batch, context), batch)
    return torch.where(batch.action_mask, advantages, 0.0).to(batch.logprobs.dtype)


def with_targets(algorithm: Algorithm, batch: Batch, context: Context) -> Batch:
    """Return the batch with the value targets that the algorithm defines, if any; without gradient."""
    if algorithm.targets is None:
        return batch
    with torch.no_grad():
        targets = _checked("targets", algorithm.targets(batch, context), batch)
    return replace(batch, targets=torch.where(batch.action_mask, targets, 0.0).to(batch.logprobs.dtype))


def with_mask(algorithm: Algorithm, mini: MiniBatch, context: Context) -> MiniBatch:
    """Return the mini-batch with the mask of the tokens in the surrogate.

    Raises:
        ValueError: If a hook returns another shape; names the hook.
    """
    with torch.no_grad():
        mask = mini.batch.action_mask
        for hook in algorithm.masks:
            mask = mask & _checked("masks", hook(mini, context), mini.batch)
    return replace(mini, mask=mask)


def _checked(slot: str, values: Tensor, batch: Batch) -> Tensor:
    if values.shape != batch.tokens.shape:
        raise ValueError(
            f"algorithm.{slot} returned shape {tuple(values.shape)}, wanted {tuple(batch.tokens.shape)}"
        )
    return values


def shape_episode(episode: Episode, shape: ShapeReward, context: Context) -> Episode:
    """Return the episode with the rewards that `shape` gives its turns.

    Raises:
        ValueError: If `shape` does not return one reward per turn.
    """
    rewards = shape(episode, context)
    if len(rewards) != len(episode.turns):
        raise ValueError(
            f"algorithm.shape_reward returned {len(rewards)} rewards for the {len(episode.turns)} turns of "
            f"episode {episode.id!r}"
        )
    turns = (replace(turn, reward=reward) for turn, reward in zip(episode.turns, rewards, strict=True))
    return replace(episode, turns=tuple(turns))
