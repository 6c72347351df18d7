"""Policy and value losses by token, and their building blocks."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.aggregation import masked_mean, sequence_members
from agentrl.algorithms.functional.shapes import same_shape

_EXPONENT_LIMIT = 20.0  # exp(20) is 5e8: larger than any useful ratio, far from overflow


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return exp(logprobs - old_logprobs), with the exponent clamped to [-20, 20]; [B, T]."""
    exponent = logprobs - old_logprobs.detach()
    return exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, turns: Tensor, trajectory: Tensor
) -> Tensor:
    """Give the tokens of a turn one ratio, the geometric mean of their ratios (GSPO).

        s = exp( mean over the turn of logprobs - old_logprobs )
        out[t] = s * exp(logprobs[t] - sg(logprobs[t]))

    where sg stops the gradient, so that d out[t] / d logprobs[t] = s. The exponent of s is clamped to [-20,
    20].

    Args:
        logprobs: [B, T] float, nats.
        old_logprobs: [B, T] float, nats; no gradient flows to them.
        mask: [B, T] bool, the action tokens.
        turns: [B, T] int64, turn index of each action token; every turn is a sequence.
        trajectory: [B] int64.

    Returns:
        [B, T] float, dimensionless, 1 where masked.

    Raises:
        ValueError: If shapes disagree.

    Source: Zheng et al. 2025, arXiv:2507.18071.
    """
    same_shape("old_logprobs", old_logprobs, "logprobs", logprobs)
    same_shape("mask", mask, "logprobs", logprobs)
    current = torch.where(mask, logprobs, 0.0)
    gap = current.detach() - torch.where(mask, old_logprobs.detach(), 0.0)
    member, count = sequence_members(mask, turns, trajectory, "turn")
    total = torch.zeros(count, dtype=gap.dtype, device=gap.device).index_add(0, member[mask], gap[mask])
    mean = total / torch.bincount(member[mask], minlength=count).clamp(min=1)
    ratio = mean.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()[member] * (current - current.detach()).exp()
    return torch.where(mask, ratio, 1.0)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual: Tensor | float | None = None,
) -> Tensor:
    """Return the policy loss that gives no incentive for ratios outside [lower, upper].

        L = max(-A * ratio, -A * clip(ratio, lower, upper))
        min(L, -A * dual) where A < 0 and `dual` is set

    Its derivative with respect to the logprob is -A * ratio, but 0 where (A > 0, ratio > upper), (A < 0,
    ratio < lower) or (A < 0, ratio > dual).

    Args:
        ratio: [B, T] float, new over old probability.
        advantages: [B, T] float; no gradient flows to them.
        lower: The lower bound of the ratio, a number or [B, T].
        upper: The upper bound of the ratio, a number or [B, T].
        dual: The bound of the dual clip, above 1, a number or [B, T]; None for no dual clip.

    Returns:
        [B, T] float.

    Source: Schulman et al. 2017, arXiv:1707.06347; Ye et al. 2020, arXiv:1912.09729 (the dual clip).
    """
    same_shape("ratio", ratio, "advantages", advantages)
    advantages = advantages.detach()
    clipped = ratio.clamp(min=lower).clamp(max=upper)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)


def stop_gradient_clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual: Tensor | float | None = None,
) -> Tensor:
    """Return `clipped_surrogate` with a gradient above the upper bound.

        L = max(-A * ratio, -A * c),   c = (upper / sg(ratio)) * ratio above `upper`, else the clipped ratio

    where sg stops the gradient. Its derivative with respect to the logprob is that of `clipped_surrogate`,
    but -A * upper instead of 0 where (A > 0, ratio > upper).

    Arguments and result are those of `clipped_surrogate`.

    Source: Dong et al. 2025, arXiv:2510.14545 (in addition to those of `clipped_surrogate`).
    """
    value = clipped_surrogate(ratio, advantages, lower, upper, dual)
    above_bound = (advantages > 0) & (ratio > upper)
    above = torch.where(above_bound, ratio, 1.0)
    return torch.where(above_bound, -advantages.detach() * upper * (above / above.detach()), value)


def clipped(ratio: Tensor, advantages: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Return where `clipped_surrogate` clips a ratio, without the dual clip; [B, T] bool."""
    return ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of the values, clipped around the old values.

        L = 0.5 max( (V - return)^2, (clip(V, V_old - clip, V_old + clip) - return)^2 )

    Args:
        values: [B, T] float, reward units.
        old_values: [B, T] float, those of the scoring pass; no gradient flows to them.
        returns: [B, T] float, the targets; no gradient flows to them.
        clip: The clip range, in reward units.

    Returns:
        [B, T] float, squared reward units.

    Raises:
        ValueError: If shapes disagree.

    Source: Schulman et al. 2017, arXiv:1707.06347 (its released code).
    """
    same_shape("old_values", old_values, "values", values)
    same_shape("returns", returns, "values", values)
    old, targets = old_values.detach(), returns.detach()
    near = values.clamp(min=old - clip, max=old + clip)
    return 0.5 * torch.maximum((values - targets).square(), (near - targets).square())


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return k1 = logprobs - reference, whose mean over the policy's own samples is the KL; [B, T] nats.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - reference.detach()


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return half the square of k1: biased, never negative, with the gradient of the KL; [B, T] nats."""
    return 0.5 * kl_k1(logprobs, reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return exp(-k1) + k1 - 1: unbiased, never negative; the exponent is within [-20, 20]; [B, T] nats."""
    k1 = kl_k1(logprobs, reference)
    return (-k1).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp() + k1 - 1


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Return truncated importance weights for tokens that another policy than the learner sampled.

        out = min( exp(old_logprobs - rollout_logprobs), cap )

    Args:
        old_logprobs: [B, T] nats, of the learner before its update.
        rollout_logprobs: [B, T] nats, of the policy that sampled.
        cap: The upper limit of the weights, above 0.

    Returns:
        [B, T], without gradient.

    Source: Espeholt et al. 2018, arXiv:1802.01561 (the truncation); Fu et al. 2025, arXiv:2505.24298 (AReaL:
    as the weight of a clipped surrogate whose ratio is relative to `old_logprobs`).
    """
    return probability_ratio(old_logprobs.detach(), rollout_logprobs).clamp(max=cap)


def covariance(advantages: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return each token's part in the covariance of advantage and logprob; high values reduce the entropy.

        out = (A - mean A) * (logprobs - mean logprobs),   means over the tokens of the mask

    Args:
        advantages: [B, T] float.
        logprobs: [B, T] float, nats.
        mask: [B, T] bool.

    Returns:
        [B, T] float, nats times the unit of `advantages`, 0 where masked; no gradient.

    Raises:
        ValueError: If shapes disagree.

    Source: Cui et al. 2025, arXiv:2505.22617.
    """
    same_shape("advantages", advantages, "mask", mask)
    same_shape("logprobs", logprobs, "mask", mask)
    advantages, logprobs = advantages.detach(), logprobs.detach()
    product = (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))
    return torch.where(mask, product, 0.0)
