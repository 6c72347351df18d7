"""Conversions between token rows [B, T], trajectories [E, L] and turns [E, K], for every layout of rows."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape


def broadcast_to_tokens(values: Tensor, trajectory: Tensor, action_mask: Tensor) -> Tensor:
    """Give every sampled token the value of its trajectory.

        out[b, t] = values[trajectory[b]] where sampled, else 0

    Args:
        values: [E] float.
        trajectory: [B] int64.
        action_mask: [B, T] bool.

    Returns:
        [B, T] float.
    """
    return torch.where(action_mask, values[trajectory][:, None], 0.0)


def unroll(mask: Tensor, turns: Tensor, trajectory: Tensor, episodes: int) -> tuple[Tensor, Tensor]:
    """Return the indices of every trajectory's action tokens, in the order of sampling.

        x.flatten()[index] is x of trajectory e's l-th action token where valid

    Args:
        mask: [B, T] bool, the action tokens.
        turns: [B, T] int64, turn index of each action token.
        trajectory: [B] int64, from 0 to `episodes` - 1.
        episodes: The number of trajectories, E.

    Returns:
        index: [E, L] int64 into the B * T flattened positions, ordered by turn and then by position in the
            row; L is the largest number of action tokens of a trajectory; 0 where not valid.
        valid: [E, L] bool.

    Raises:
        ValueError: If shapes disagree.
    """
    same_shape("mask", mask, "turns", turns)
    rows, positions = mask.nonzero(as_tuple=True)
    owner = trajectory[rows]
    stride = int(turns.max()) + 1 if turns.numel() else 1
    order = ((owner * stride + turns[mask]) * mask.shape[1] + positions).argsort(stable=True)
    counts = torch.bincount(owner, minlength=episodes)
    longest = int(counts.max()) if episodes else 0
    valid = torch.arange(longest, device=mask.device) < counts[:, None]
    index = torch.zeros_like(valid, dtype=torch.int64)
    index[valid] = (rows * mask.shape[1] + positions)[order]
    return index, valid


def turn_means(
    values: Tensor, mask: Tensor, turns: Tensor, trajectory: Tensor, episodes: int
) -> tuple[Tensor, Tensor]:
    """Average over the action tokens of every turn.

        means[e, k] = mean of values over the action tokens of turn k of trajectory e

    Args:
        values: [B, T] float.
        mask: [B, T] bool, the action tokens.
        turns: [B, T] int64, turn index of each action token, below 0 where there is no turn.
        trajectory: [B] int64.
        episodes: The number of trajectories, E.

    Returns:
        means: [E, K] float, where K is the highest turn index plus 1; 0 where not present.
        present: [E, K] bool, the turns with an action token.

    Raises:
        ValueError: If shapes disagree.
    """
    same_shape("mask", mask, "values", values)
    same_shape("turns", turns, "values", values)
    width = int(turns.max()) + 1 if turns.numel() else 0
    step = (trajectory[:, None] * width + turns)[mask]
    total = torch.zeros(episodes * width, dtype=values.dtype, device=values.device)
    total = total.index_add(0, step, values[mask])
    counts = torch.bincount(step, minlength=episodes * width)
    means = total / counts.clamp(min=1)
    return means.reshape(episodes, width), (counts > 0).reshape(episodes, width)


def broadcast_turns_to_tokens(table: Tensor, turns: Tensor, trajectory: Tensor, mask: Tensor) -> Tensor:
    """Give every action token the value of its turn.

        out[b, t] = table[trajectory[b], turns[b, t]] where mask, else 0

    Args:
        table: [E, K] float.
        turns: [B, T] int64, below K at every action token.
        trajectory: [B] int64.
        mask: [B, T] bool, the action tokens.

    Returns:
        [B, T] float.

    Raises:
        ValueError: If shapes disagree.
    """
    same_shape("mask", mask, "turns", turns)
    out = torch.zeros(mask.shape, dtype=table.dtype, device=table.device)
    out[mask] = table[trajectory[:, None].expand_as(turns)[mask], turns[mask]]
    return out
