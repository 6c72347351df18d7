"""How far two distributions of a token are apart, and the bonuses of an advantage."""

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
