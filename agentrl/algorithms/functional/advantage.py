"""Advantages of trajectories, and transforms of advantages over a whole batch."""

from typing import Literal

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape

Singleton = Literal["zero", "raw"]


def group_relative_advantage(
    returns: Tensor,
    groups: Tensor,
    *,
    divide_by_std: bool = True,
    copies: Tensor | None = None,
    singleton: Singleton = "zero",
    eps: float = 1e-6,
    ddof: Literal[0, 1] = 1,
) -> Tensor:
    """Centre every trajectory's return within its group.

        A[i] = (R[i] - mean R[g]) / (std R[g] + eps)

    with the std of divisor n - ddof. With `copies`, trajectory i counts copies[i] times in mean and std.

    Args:
        returns: [E] float, reward units of the environment.
        groups: [E] int64, equal for rollouts of one task.
        divide_by_std: False gives the mean-only baseline of Dr. GRPO.
        copies: [E] float, or None for 1 each. The number of turns gives the per-row statistics of verl-agent;
            1 / n for each of n branches counts the shared part once.
        singleton: The advantage in a group with a total count of 1: `zero`, or `raw` for mean 0 and std 1, as
            in verl: R / (1 + eps), or R without the std.
        eps: Added to the std, to keep the quotient finite.
        ddof: 1 for the unbiased std, 0 for that of the population.

    Returns:
        [E] float, dimensionless (reward units if `divide_by_std` is False); no gradient. A group of equal
        returns gets exactly 0.

    Raises:
        ValueError: If shapes disagree.

    Source: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783.
    """
    same_shape("groups", groups, "returns", returns)
    if not len(returns):
        return returns.clone()
    values = returns.detach()
    weight = torch.ones_like(values) if copies is None else copies.to(values)
    centred, member, count = _centred(values, groups, weight)
    lone = count[member] < 1.5  # 1 up to rounding, if copies are fractions
    alone = values if singleton == "raw" else torch.zeros_like(values)
    if not divide_by_std:
        return torch.where(lone, alone, centred)
    variance = _sum_by(member, weight * centred.square()) / (count - ddof).clamp(min=1)
    return torch.where(lone, alone / (1 + eps), centred / (variance.sqrt()[member] + eps))


def leave_one_out_advantage(returns: Tensor, groups: Tensor, *, singleton: Singleton = "zero") -> Tensor:
    """Subtract the mean return of the other trajectories of the group from every return.

        A[i] = R[i] - mean_{j in g, j != i} R[j] = n / (n - 1) * (R[i] - mean R[g])

    Args:
        returns: [E] float, reward units of the environment.
        groups: [E] int64, equal for rollouts of one task.
        singleton: The advantage of the only trajectory of a group: `zero`, or its `raw` return, as in verl.

    Returns:
        [E] float, reward units; no gradient. A group of equal returns gets exactly 0.

    Raises:
        ValueError: If shapes disagree.

    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """
    same_shape("groups", groups, "returns", returns)
    if not len(returns):
        return returns.clone()
    values = returns.detach()
    centred, member, count = _centred(values, groups, torch.ones_like(values))
    size = count[member]
    raw = (size == 1) & (singleton == "raw")
    return torch.where(raw, values, centred * size / (size - 1).clamp(min=1))


def relative_certainty(entropies: Tensor, means: Tensor) -> Tensor:
    """Return how certain each trajectory is, compared with the others of its group.

        Y[i] = max(0, 1 + (mean H[g] - H[i]) / mean H[g]),   1 where the mean is 0

    Args:
        entropies: [E] float, nats, H, the mean entropy of a trajectory's action tokens.
        means: [E] float, nats, the mean of H over the group of each trajectory.

    Returns:
        [E] float, dimensionless, at least 0.

    Source: ETTRL, arXiv:2508.11356; the limit of 0 is ours.
    """
    known = means > 0
    return torch.where(known, 2 - entropies / torch.where(known, means, 1.0), 1.0).clamp(min=0)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Normalise the tokens of the mask to mean 0 and variance 1.

        out = (x - mean x) / sqrt(var x + eps)

    over all tokens of the mask, with the unbiased variance; the variance of a single token is 0.

    Args:
        values: [B, T] float.
        mask: [B, T] bool.
        eps: Added to the variance, to keep the quotient finite.

    Returns:
        [B, T] float, dimensionless, 0 where masked; no gradient. Equal values get exactly 0.

    Raises:
        ValueError: If shapes disagree.
    """
    centred, variance = _standardised(values, mask)
    return centred / (variance + eps).sqrt()


def entropy_modulation(
    entropies: Tensor, present: Tensor, *, k: float, k_future: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the factors by which EMPG scales steps and rewards their successors.

        N = (H - min H) / (max H - min H + 1e-8)
        g = exp(-k N) / (mean exp(-k N) + 1e-8),   f = exp(-k_future N)

    Minimum, maximum and mean are over all steps that are present, so that the mean of g is 1.

    Args:
        entropies: [E, K] float, nats, mean over the action tokens of each turn under the policy that acted.
        present: [E, K] bool, the turns that are steps.
        k: How strongly g prefers low entropy.
        k_future: How strongly f prefers low entropy.
        weights: [E, K] float, the weight of each step in the mean, or None for 1 each. A step shared by n
            branches has the weight 1 / n.

    Returns:
        g and f, [E, K] float each, dimensionless, 0 where not present; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Wang et al. 2025, arXiv:2509.09265.
    """
    same_shape("present", present, "entropies", entropies)
    if not bool(present.any()):
        return torch.zeros_like(entropies), torch.zeros_like(entropies)
    values = entropies.detach()
    lowest, highest = values[present].min(), values[present].max()
    level = (values - lowest) / (highest - lowest + 1e-8)
    certainty = torch.where(present, (-k * level).exp(), 0.0)
    scale = certainty / (_step_mean(certainty, present, weights) + 1e-8)
    return scale, torch.where(present, (-k_future * level).exp(), 0.0)


def entropy_modulated_advantage(
    advantages: Tensor,
    entropies: Tensor,
    present: Tensor,
    *,
    k: float,
    k_future: float,
    zeta: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Scale each step's advantage by its certainty, add a bonus for a certain next step, and centre (EMPG).

        A'[e, t] = A[e, t] g[e, t] + zeta f[e, next step after t],   no bonus at a trajectory's last step
        out      = A' - mean A'

    with g and f of `entropy_modulation`; the mean is over all steps that are present.

    Args:
        advantages: [E, K] float, of each step.
        entropies: [E, K] float, nats.
        present: [E, K] bool, the turns that are steps; other turns are skipped, also by "next".
        k: See `entropy_modulation`.
        k_future: See `entropy_modulation`.
        zeta: The weight of the bonus, in units of the advantage.
        weights: [E, K] float or None, the weight of each step in both means.

    Returns:
        [E, K] float, units of `advantages`, 0 where not present; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Wang et al. 2025, arXiv:2509.09265.
    """
    same_shape("advantages", advantages, "entropies", entropies)
    scale, clarity = entropy_modulation(entropies, present, k=k, k_future=k_future, weights=weights)
    modulated = torch.where(present, advantages.detach(), 0.0) * scale + zeta * _following(clarity, present)
    return torch.where(present, modulated - _step_mean(modulated, present, weights), 0.0)


def entropy_scaled_advantage(
    advantages: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    scale: float,
    limits: tuple[float, float] | None = (0.0, 2.0),
) -> Tensor:
    """Scale up the advantage of uncertain tokens and scale down that of certain ones (AEPO).

        out = A * clip(1 + scale * (H - mean H) / std H, limits)

    Mean and unbiased std are over the tokens of the mask; a std of 0 counts as 1.

    Args:
        advantages: [B, T] float.
        entropies: [B, T] float, nats.
        mask: [B, T] bool.
        scale: The change of the factor per standard deviation of the entropy.
        limits: The limits of the factor; None lets it become negative, as in the released code.

    Returns:
        [B, T] float, units of `advantages`, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Dong et al. 2025, arXiv:2510.14545.
    """
    same_shape("advantages", advantages, "entropies", entropies)
    factor = entropy_factor(entropies, mask, scale=scale)
    if limits is not None:
        factor = factor.clamp(*limits)
    return torch.where(mask, advantages.detach(), 0.0) * factor


def entropy_factor(entropies: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Return the factor of `entropy_scaled_advantage` before its limits.

        1 + scale * (H - mean H) / std H

    Arguments are those of `entropy_scaled_advantage`.

    Returns:
        [B, T] float, dimensionless, 1 where masked; no gradient.
    """
    centred, variance = _standardised(entropies, mask)
    return 1 + scale * centred / torch.where(variance > 0, variance, 1.0).sqrt()


def _centred(values: Tensor, groups: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values less their group's mean, each value's group number, and the weight of every group."""
    _, member = groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    count = _sum_by(member, weight)
    # Subtracting the minimum first keeps equal returns at exactly 0, whatever their binary rounding.
    shifted = values - _lowest_by(member, values)[member]
    return shifted - (_sum_by(member, weight * shifted) / count)[member], member, count


def _standardised(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values less their mean over the mask, 0 outside it, and their unbiased variance."""
    same_shape("mask", mask, "values", values)
    if not bool(mask.any()):
        return torch.zeros_like(values), values.new_zeros(())
    kept = values.detach()[mask]
    # As in `_centred`: equal values must have a variance of exactly 0.
    shifted = kept - kept.min()
    centred = torch.zeros_like(values)
    centred[mask] = shifted - shifted.mean()
    return centred, centred.square().sum() / max(len(kept) - 1, 1)


def _step_mean(values: Tensor, present: Tensor, weights: Tensor | None) -> Tensor:
    weight = present.to(values) if weights is None else torch.where(present, weights.to(values), 0.0)
    total = weight.sum()
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _following(values: Tensor, present: Tensor) -> Tensor:
    """Return the value of the next step that is present; [E, K], 0 where there is none."""
    out = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    for step in reversed(range(values.shape[1])):
        out[:, step] = ahead
        ahead = torch.where(present[:, step], values[:, step], ahead)
    return out


def _sum_by(member: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(int(member.max()) + 1, dtype=values.dtype, device=values.device).index_add_(
        0, member, values
    )


def _lowest_by(member: Tensor, values: Tensor) -> Tensor:
    lowest = torch.full((int(member.max()) + 1,), torch.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce_(0, member, values, "amin")
