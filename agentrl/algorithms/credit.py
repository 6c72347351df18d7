"""Advantages of tokens from episodes: the part of an algorithm that runs before the updates."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.hooks import Context, MiniBatch, ShapeGroup, ShapeReward
from agentrl.algorithms.named_features import with_features
from agentrl.data.batch import Batch, Layout, collate, scored_at
from agentrl.data.trajectory import Episode, Group


def prepare(
    algorithm: Algorithm,
    groups: Sequence[Group],
    context: Context,
    *,
    layout: Layout = "trajectory",
    selected: bool = False,
    temperature: float = 1.0,
) -> Batch:
    """Turn a step's groups into a batch: select (unless `selected`), shape rewards, collate.

    Selection sees the environment's rewards. The batch and its episodes hold the shaped ones: each episode by
    itself first (`shape_reward`), then in comparison with its group (`shape_group`). The episodes of a second
    rollout (`RolloutPlan.second`) are to be scored at `temperature`, that of the step.
    """
    kept = groups if selected else algorithm.select(groups, context)
    kept = shape_rewards(kept, context, algorithm.shape_reward, algorithm.shape_group)
    batch, plan = collate(kept, layout=layout), algorithm.rollout
    if not plan.second or plan.episodes is None or batch.members is None:
        return batch
    return scored_at(batch, batch.members >= plan.episodes - plan.second, temperature)


def compute_advantages(algorithm: Algorithm, batch: Batch, context: Context) -> Tensor:
    """Return the transformed advantages of the whole rollout batch; [B, T], no gradient, 0 where not sampled.

    Features that the advantage and the transforms require are computed, unless the batch holds them.

    Raises:
        ValueError: If a hook returns another shape; names the hook.
    """
    batch = with_features(batch, algorithm.requires_of("advantage", "transforms"))
    with torch.no_grad():
        advantages = _checked("advantage", algorithm.advantage(batch, context), batch)
        for transform in algorithm.transforms:
            advantages = _checked("transforms", transform(advantages, batch, context), batch)
    return torch.where(batch.action_mask, advantages, 0.0).to(batch.logprobs.dtype)


def with_targets(algorithm: Algorithm, batch: Batch, context: Context) -> Batch:
    """Return the batch with the value targets that the algorithm defines, if any; without gradient."""
    if algorithm.targets is None:
        return batch
    batch = with_features(batch, algorithm.requires_of("targets"))
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


def shape_rewards(
    groups: Sequence[Group],
    context: Context,
    shape_reward: Sequence[ShapeReward] = (),
    shape_group: Sequence[ShapeGroup] = (),
) -> list[Group]:
    """Return the groups with the rewards of all shapers, those of single episodes first.

    Raises:
        ValueError: If a shaper does not return one reward per turn.
    """
    shaped = list(groups)
    for shape in shape_reward:
        shaped = [
            replace(
                group, episodes=tuple(shape_episode(episode, shape, context) for episode in group.episodes)
            )
            for group in shaped
        ]
    for compare in shape_group:
        shaped = [_shape_group(group, compare, context) for group in shaped]
    return shaped


def shape_episode(episode: Episode, shape: ShapeReward, context: Context) -> Episode:
    """Return the episode with the rewards that `shape` gives its turns.

    Raises:
        ValueError: If `shape` does not return one reward per turn.
    """
    return _with_rewards("shape_reward", episode, shape(episode, context))


def _shape_group(group: Group, shape: ShapeGroup, context: Context) -> Group:
    finished = group.finished
    if not finished:
        return group
    rewards = shape(replace(group, episodes=finished), context)
    if len(rewards) != len(finished):
        raise ValueError(
            f"algorithm.shape_group returned rewards for {len(rewards)} episodes, wanted them for the "
            f"{len(finished)} finished ones of task {group.task!r}"
        )
    shaped = iter(
        _with_rewards("shape_group", episode, given) for episode, given in zip(finished, rewards, strict=True)
    )
    # Aborted episodes keep their place, since others may branch off them.
    return replace(
        group,
        episodes=tuple(episode if episode.stop.aborted else next(shaped) for episode in group.episodes),
    )


def _with_rewards(slot: str, episode: Episode, rewards: Sequence[float]) -> Episode:
    if len(rewards) != len(episode.turns):
        raise ValueError(
            f"algorithm.{slot} returned {len(rewards)} rewards for the {len(episode.turns)} turns of "
            f"episode {episode.id!r}"
        )
    turns = (replace(turn, reward=reward) for turn, reward in zip(episode.turns, rewards, strict=True))
    return replace(episode, turns=tuple(turns))
