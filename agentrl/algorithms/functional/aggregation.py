"""Aggregation of token values to one number: weights over a mask, and the count that divides their sum."""

from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape

Unit = Literal["turn", "trajectory"]


def token_weights(mask: Tensor, turns: Tensor, trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Weight every token equally.

        sum(w * x) / count = sum(x * m) / sum(m)

    Args:
        mask: [B, T] bool, the tokens that count.
        turns: [B, T] int64, turn index of each token.
        trajectory: [B] int64.

    Returns:
        w: [B, T] float64.
        count: 0-dim, the divisor. It is returned separately, so that parts of a batch (ranks) can add up
            their counts and share one denominator.
    """
    weights = mask.double()
    return weights, weights.sum()


def sequence_weights(
    mask: Tensor, turns: Tensor, trajectory: Tensor, *, sequence: Unit = "trajectory"
) -> tuple[Tensor, Tensor]:
    """Average over the tokens of a sequence, then over sequences.

        sum(w * x) / count = mean_s( sum_{t in s} x m / sum_{t in s} m )

    A sequence is a trajectory or one of its turns, whichever rows its tokens are in. A sequence without a
    token in the mask is not counted.

    Arguments and results are those of `token_weights`; the count is the number of sequences, and `sequence`
    says what a sequence is.
    """
    member, total = sequence_members(mask, turns, trajectory, sequence)
    lengths = torch.bincount(member[mask], minlength=total).double()
    weights = torch.where(mask, 1.0 / lengths.clamp(min=1)[member], 0.0)
    return weights, (lengths > 0).sum().double()


def trajectory_weights(mask: Tensor, turns: Tensor, trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Average over the tokens of a turn, then over the turns of a trajectory, then over trajectories.

        w[b, t] = m / (turns of the trajectory with a token in the mask * tokens of the turn in the mask)

    Arguments and results are those of `token_weights`; the count is the number of trajectories.

    Source: Xu et al. 2025, arXiv:2509.22576 (the entropy of a trajectory).
    """
    turn, turn_total = sequence_members(mask, turns, trajectory, "turn")
    _, row_member = trajectory.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    lengths = torch.bincount(turn[mask], minlength=turn_total).double()
    owner = torch.zeros(turn_total, dtype=torch.int64, device=mask.device)
    owner[turn[mask]] = row_member[:, None].expand_as(mask)[mask]
    members = int(row_member.max()) + 1 if len(row_member) else 0
    turns_of = torch.bincount(owner[lengths > 0], minlength=members).double()
    share = 1.0 / (turns_of.clamp(min=1)[owner] * lengths.clamp(min=1))
    return torch.where(mask, share[turn], 0.0), (turns_of > 0).sum().double()


def constant_weights(
    mask: Tensor, turns: Tensor, trajectory: Tensor, *, length: int, sequence: Unit = "trajectory"
) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of a sequence, average over sequences, and divide by a constant length.

        sum(w * x) / count = mean_s( sum_{t in s} x m / length )

    Tokens of long sequences are not weighted down, and the scale does not depend on padding. Arguments and
    results are those of `sequence_weights`; `length` is in tokens. The weights sum to less than `count` if
    sequences are shorter than `length`.

    Source: Liu et al. 2025, arXiv:2503.20783.
    """
    _, count = sequence_weights(mask, turns, trajectory, sequence=sequence)
    return mask.double() / length, count


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average [B, T] over a mask; 0 if the mask is empty. Values outside the mask are ignored."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_members(mask: Tensor, turns: Tensor, trajectory: Tensor, sequence: Unit) -> tuple[Tensor, int]:
    """Return the number of each token's sequence, [B, T] int64, and how many sequences there are."""
    same_shape("mask", mask, "turns", turns)
    owner = trajectory[:, None].expand_as(turns)
    if sequence == "turn":
        owner = owner * (int(turns.max()) + 2 if turns.numel() else 1) + turns + 1
    found, member = owner.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return member, len(found)
