"""Implicit process rewards: what a language model says of each token, against a frozen one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agentrl.algorithms.functional.returns import discounted_returns
from agentrl.algorithms.functional.shapes import same_shape


def implicit_rewards(gaps: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Return the process reward of every action token but the last one of its row.

        r[t] = beta * gap[t],   0 at the last action token

    Args:
        gaps: [E, L] float, nats, the log-probability under the reward model minus that under the reference. A
            row holds a trajectory, see `unroll`.
        mask: [E, L] bool, the action tokens.
        beta: The reward of a nat.

    Returns:
        [E, L] float, reward units, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Cui et al. 2025, arXiv:2502.01456; Yuan et al. 2024, arXiv:2412.01981.
    """
    same_shape("mask", mask, "gaps", gaps)
    later = mask.flip(1).cumsum(1).flip(1) > 1
    return torch.where(mask & later, beta * gaps.detach(), 0.0)


def over_largest_return(rewards: Tensor, mask: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Divide rewards by the largest size of a return in the batch.

        out = r / (max |r[t] + r[t + 1] + ...| + eps)

    Args:
        rewards: [E, L] float.
        mask: [E, L] bool, the action tokens.
        eps: Added to the divisor, to keep the quotient finite.

    Returns:
        [E, L] float, dimensionless, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Cui et al. 2025, arXiv:2502.01456 (its released code).
    """
    returns = discounted_returns(rewards, mask, gamma=1.0)
    largest = returns.abs().max() if returns.numel() else returns.new_zeros(())
    return torch.where(mask, rewards.detach(), 0.0) / (largest + eps)


def leave_one_out_rewards(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Subtract from every reward of a token the mean reward of the other trajectories of its group.

        out[i, t] = n / (n - 1) r[i, t] - sum_j m[j] / (n - 1),   m[j] = mean over t of r[j, t]

    over the n trajectories j of the group that have a token. The mean of out[i] over t is m[i] minus the
    mean of m over the others.

    Args:
        rewards: [E, L] float.
        mask: [E, L] bool, the tokens that have a reward.
        groups: [E] int64, equal for rollouts of one task.

    Returns:
        [E, L] float, units of `rewards`, 0 where masked and in a group of one; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Cui et al. 2025, arXiv:2502.01456 (its released code).
    """
    same_shape("mask", mask, "rewards", rewards)
    values = torch.where(mask, rewards.detach(), 0.0)
    tokens = mask.sum(dim=1)
    means = values.sum(dim=1) / tokens.clamp(min=1)
    same = ((groups[:, None] == groups[None, :]) & (tokens > 0)[None, :]).to(values)
    size = same.sum(dim=1, keepdim=True)
    total = (same @ means)[:, None]
    compared = (size * values - total) / (size - 1).clamp(min=1)
    return torch.where(mask & (size > 1), compared, 0.0)


def outcome_cross_entropy(scores: Tensor, successes: Tensor) -> Tensor:
    """Return the mean cross entropy of outcomes under the probabilities sigmoid(score).

        - mean of  y log sigmoid(s) + (1 - y) log(1 - sigmoid(s))

    Args:
        scores: [N] float, log-odds of success, with gradient.
        successes: [N] bool.

    Returns:
        A number, in nats; 0 of no scores.

    Raises:
        ValueError: If shapes disagree.

    Source: Yuan et al. 2024, arXiv:2412.01981.
    """
    same_shape("successes", successes, "scores", scores)
    if not len(scores):
        return scores.sum()
    return F.binary_cross_entropy_with_logits(scores, successes.to(scores))
