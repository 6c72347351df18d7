"""Divergence of a policy from a teacher over all choices of a token."""

import math

import torch
from torch import Tensor


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
