"""The mathematics, as pure functions. Position t describes token t; no value at a masked position matters.

Letters: B rows, T tokens per row, E trajectories. Entropies and logprobs are in nats.
"""

from typing import Literal

import torch
from torch import Tensor

Unit = Literal["turn", "trajectory"]

_EXPONENT_LIMIT = 20.0  # exp(20) is 5e8: past any use, short of any overflow


def group_relative_advantage(
    returns: Tensor,
    groups: Tensor,
    *,
    divide_by_std: bool = True,
    copies: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Centre every trajectory's return within its group.

        A[i] = (R[i] - mean R[g]) / (std R[g] + eps)

    where std is the unbiased one (divisor n - 1). With `copies`, trajectory i counts copies[i] times in both.

    Args:
        returns: [E] float, reward units of the environment.
        groups: [E] int64, equal for rollouts of one task.
        divide_by_std: False gives the mean-only baseline of Dr. GRPO.
        copies: [E] float or None for 1 each; the number of turns gives the per-row statistics of verl-agent.
        eps: keeps the quotient finite.

    Returns:
        [E] float, dimensionless (reward units when `divide_by_std` is False); no gradient. A group of one,
        and a group of equal returns, gets exactly 0.

    Raises:
        ValueError: if shapes disagree.

    Source: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783.
    """
    _same_shape("groups", groups, "returns", returns)
    if not len(returns):
        return returns.clone()
    values = returns.detach()
    weight = torch.ones_like(values) if copies is None else copies.to(values)
    _, member = groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    count = _sum_by(member, weight)
    # Taking the lowest return off first leaves equal returns at an exact 0, whatever their binary rounding.
    shifted = values - _lowest_by(member, values)[member]
    centred = shifted - (_sum_by(member, weight * shifted) / count)[member]
    if not divide_by_std:
        return centred
    variance = _sum_by(member, weight * centred.square()) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt()[member] + eps)


def spread(values: Tensor, trajectory: Tensor, sampled: Tensor) -> Tensor:
    """Give every sampled token the value of its trajectory.

        out[b, t] = values[trajectory[b]] where sampled, else 0

    Args:
        values: [E] float.
        trajectory: [B] int64.
        sampled: [B, T] bool.

    Returns:
        [B, T] float.
    """
    return torch.where(sampled, values[trajectory][:, None], 0.0)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """New over old probability, exp(logprobs - old_logprobs), the exponent kept within [-20, 20]; [B, T]."""
    exponent = logprobs - old_logprobs.detach()
    return exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual: float | None = None,
) -> Tensor:
    """Penalise ratios that leave [lower, upper] in the direction that the advantage asks for.

        L = max(-A * ratio, -A * clip(ratio, lower, upper));   where A < 0 and `dual` is set: min(L, -A *
        dual)

    Its derivative by the logprob is -A * ratio, except 0 where (A > 0, ratio > upper), (A < 0, ratio < lower)
    or (A < 0, ratio > dual).

    Args:
        ratio: [B, T] float, of new to old probability.
        advantages: [B, T] float; no gradient flows to them.
        lower: bound of the ratio, a number or [B, T].
        upper: likewise.
        dual: above 1, or None for no second clip.

    Returns:
        [B, T] float.

    Source: Schulman et al. 2017, arXiv:1707.06347; Ye et al. 2020, arXiv:1912.09729 (the dual clip).
    """
    _same_shape("ratio", ratio, "advantages", advantages)
    advantages = advantages.detach()
    clipped = ratio.clamp(min=lower).clamp(max=upper)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)


def clipped(ratio: Tensor, advantages: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Where `clipped_surrogate` holds a ratio back: [B, T] bool (the dual clip is not counted)."""
    return ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Log-ratio k1 = logprobs - reference, whose mean over the policy's own samples is the KL; [B, T] nats.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - reference.detach()


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Half the square of k1: biased, never negative, its gradient is that of the KL; [B, T] nats."""
    return 0.5 * kl_k1(logprobs, reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(-k1) + k1 - 1: unbiased, never negative; the exponent is kept within [-20, 20]; [B, T] nats."""
    k1 = kl_k1(logprobs, reference)
    return (-k1).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp() + k1 - 1


def token_weights(mask: Tensor, turns: Tensor, trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Every token counts the same.

        sum(w * x) / count = sum(x * m) / sum(m)

    Args:
        mask: [B, T] bool, the tokens that count.
        turns: [B, T] int64, turn index of each token.
        trajectory: [B] int64.

    Returns:
        w: [B, T] float64, and the count to divide by (0-dim): two numbers per part of a batch, so that parts
            (ranks)
        add up their counts and share one denominator.
    """
    weights = mask.double()
    return weights, weights.sum()


def sequence_weights(
    mask: Tensor, turns: Tensor, trajectory: Tensor, *, sequence: Unit = "trajectory"
) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of a sequence, then mean over sequences.

        sum(w * x) / count = mean_s( sum_{t in s} x m / sum_{t in s} m )

    A sequence is a trajectory or one turn of it, whichever rows its tokens are in; one without a token that
    counts is not counted.

    Arguments and results are those of `token_weights`, the count being that of sequences; `sequence` says
    what is averaged first.
    """
    member, total = _members(mask, turns, trajectory, sequence)
    lengths = torch.bincount(member[mask], minlength=total).double()
    weights = torch.where(mask, 1.0 / lengths.clamp(min=1)[member], 0.0)
    return weights, (lengths > 0).sum().double()


def trajectory_weights(mask: Tensor, turns: Tensor, trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of a turn, then over the turns of a trajectory, then over trajectories.

        w[b, t] = m / (turns with a token that counts in the trajectory * tokens that count in the turn)

    Arguments and results are those of `token_weights`, the count being that of trajectories.

    Source: Xu et al. 2025, arXiv:2509.22576 (the entropy of a trajectory).
    """
    turn, turn_total = _members(mask, turns, trajectory, "turn")
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
    """Sum over the tokens of a sequence, mean over sequences, divided by a length that is a constant.

        sum(w * x) / count = mean_s( sum_{t in s} x m / length )

    so that a long sequence is not discounted for its length, and the scale depends on no padding. Arguments
    and results are those of `sequence_weights`, `length` in tokens; the weights sum to less than `count`
    where sequences are shorter.

    Source: Liu et al. 2025, arXiv:2503.20783.
    """
    _, count = sequence_weights(mask, turns, trajectory, sequence=sequence)
    return mask.double() / length, count


def entropy_means(entropies: Tensor, mask: Tensor, turns: Tensor, trajectory: Tensor) -> dict[str, Tensor]:
    """Average entropy at three levels; they differ when turns or trajectories differ in length.

        token      = sum(H m) / sum(m)
        turn       = mean over turns of the turn's token mean
        trajectory = mean over trajectories of the mean over their turns

    Args:
        entropies: [B, T] float, nats.
        mask: [B, T] bool, the decisions.
        turns: [B, T] int64.
        trajectory: [B] int64.

    Returns:
        0-dim tensors by level, in nats; 0 without any decision.
    """
    levels = {
        "token": token_weights(mask, turns, trajectory),
        "turn": sequence_weights(mask, turns, trajectory, sequence="turn"),
        "trajectory": trajectory_weights(mask, turns, trajectory),
    }
    values = torch.where(mask, entropies, 0.0).double()
    return {name: (weights * values).sum() / count.clamp(min=1) for name, (weights, count) in levels.items()}


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, T] over a mask; 0 where it is empty, and no value outside it matters."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _members(mask: Tensor, turns: Tensor, trajectory: Tensor, sequence: Unit) -> tuple[Tensor, int]:
    """Number the sequences that tokens belong to: [B, T] int64, and how many there are."""
    _same_shape("mask", mask, "turns", turns)
    owner = trajectory[:, None].expand_as(turns)
    if sequence == "turn":
        owner = owner * (int(turns.max()) + 2 if turns.numel() else 1) + turns + 1
    found, member = owner.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return member, len(found)


def _sum_by(member: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(int(member.max()) + 1, dtype=values.dtype, device=values.device).index_add_(
        0, member, values
    )


def _lowest_by(member: Tensor, values: Tensor) -> Tensor:
    lowest = torch.full((int(member.max()) + 1,), torch.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce_(0, member, values, "amin")


def _same_shape(name: str, value: Tensor, other: str, wanted: Tensor) -> None:
    if value.shape != wanted.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, wanted that of {other}, {tuple(wanted.shape)}"
        )
