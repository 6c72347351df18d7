"""Divergence of two distributions of a token, and bonuses that are bounded by the advantage."""

import math

import torch
from torch import Tensor


def symmetric_divergence(logprobs: Tensor, others: Tensor) -> Tensor:
    """Return the mean of both Kullback-Leibler divergences; [N] nats.

        (KL(p || q) + KL(q || p)) / 2 = sum_v (p_v - q_v) (log p_v - log q_v) / 2

    Args:
        logprobs: [N, V], log p; -inf where neither has a choice.
        others: [N, V], log q.

    Source: VOGUE, arXiv:2510.01444.
    """
    absent = logprobs == -torch.inf
    return ((logprobs.exp() - others.exp()) * (logprobs - others).masked_fill(absent, 0.0)).sum(dim=-1) / 2


def taken_divergence(logprobs: Tensor, others: Tensor) -> Tensor:
    """Return what the token that was taken adds to the symmetric divergence; [N] nats.

        (p_t - q_t) (log p_t - log q_t) / 2

    Args:
        logprobs: [N], log p of the token.
        others: [N], log q of the token.

    Source: VOGUE, arXiv:2510.01444, its released code.
    """
    return (logprobs.exp() - others.exp()) * (logprobs - others) / 2


def bounded_bonus(advantages: Tensor, uncertainty: Tensor, weight: float, bound: float) -> Tensor:
    """Return a bonus that is at most a part of the advantage; of the shape of `advantages`.

        min(|A| / bound, weight * u)

    Source: VOGUE, arXiv:2510.01444.
    """
    return torch.minimum(advantages.abs() / bound, weight * uncertainty)


def interpolated_divergence(logits: Tensor, teacher_logits: Tensor, interpolation: float) -> Tensor:
    """Return the divergence of a policy p from its teacher q; [N] nats, at least 0, 0 where they are equal.

        1:       KL(p || q)  = sum_v p_v (log p_v - log q_v),   reverse
        0:       KL(q || p),                                     forward
        else b:  b KL(q || m) + (1 - b) KL(p || m),   m = b q + (1 - b) p,   Jensen-Shannon

    Its gradient flows to the policy only. Where a logit of both is -inf, the token is no choice and adds 0.

    Args:
        logits: [N, V] float, those of the policy.
        teacher_logits: [N, V] float, those of the teacher.
        interpolation: b, in [0, 1].

    Raises:
        ValueError: If the shapes differ.

    Source: Agarwal et al. 2023, arXiv:2306.13649, equation 1; the special cases are those of TRL.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and the teacher's {tuple(teacher_logits.shape)}, "
            "wanted the same"
        )
    own, teacher = _log_softmax(logits), _log_softmax(teacher_logits.detach())
    if interpolation == 1:
        return _kl(own, teacher)
    if interpolation == 0:
        return _kl(teacher, own)
    mixture = torch.logaddexp(own + math.log(1 - interpolation), teacher + math.log(interpolation))
    return interpolation * _kl(teacher, mixture) + (1 - interpolation) * _kl(own, mixture)


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities, with the lowest number in place of -inf, so that no difference is nan."""
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.masked_fill(logits == -torch.inf, torch.finfo(logprobs.dtype).min / 4)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    return (one.exp() * (one - other)).sum(dim=-1)
