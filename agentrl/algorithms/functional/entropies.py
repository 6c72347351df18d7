"""Entropy of a distribution, its means over a batch, and its distance from a band."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.aggregation import sequence_weights, token_weights, trajectory_weights


def entropy(logits: Tensor) -> Tensor:
    """Return the exact entropy of softmax(logits).

        H = -sum_v p_v log p_v,   dH/dlogits_v = -p_v (log p_v + H)

    Args:
        logits: [..., V] float, already divided by the sampling temperature; -inf forbids a token.

    Returns:
        [...] float, nats, with gradient.
    """
    return top_k_entropy(logits.log_softmax(dim=-1))


def top_k_entropy(logprobs: Tensor) -> Tensor:
    """Return the part of the entropy that comes from the given tokens, a lower bound of the entropy.

        H_k = -sum_v p_v log p_v   over the K tokens

    Args:
        logprobs: [..., K] float, nats, usually of the K most likely tokens; -inf is padding.

    Returns:
        [...] float, nats, with gradient.
    """
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(dim=-1)


def entropy_means(entropies: Tensor, mask: Tensor, turns: Tensor, trajectory: Tensor) -> dict[str, Tensor]:
    """Average the entropy at three levels, which differ if turns or trajectories differ in length.

        token      = sum(H m) / sum(m)
        turn       = mean over turns of the turn's token mean
        trajectory = mean over trajectories of the mean over their turns

    Args:
        entropies: [B, T] float, nats.
        mask: [B, T] bool, the action tokens.
        turns: [B, T] int64.
        trajectory: [B] int64.

    Returns:
        0-dim tensors by level, in nats; 0 if there is no action token.
    """
    levels = {
        "token": token_weights(mask, turns, trajectory),
        "turn": sequence_weights(mask, turns, trajectory, sequence="turn"),
        "trajectory": trajectory_weights(mask, turns, trajectory),
    }
    values = torch.where(mask, entropies, 0.0).double()
    return {name: (weights * values).sum() / count.clamp(min=1) for name, (weights, count) in levels.items()}


def entropy_band_violation(entropies: Tensor, reference: Tensor | float, low: float, high: float) -> Tensor:
    """Return how far the entropy is outside a band around its reference (EPO).

        S = max(low * ref - H, 0) + max(H - high * ref, 0)

    Args:
        entropies: [B, T] float, nats.
        reference: [B, T] float or a number, nats; no gradient flows to it.
        low: The lower bound of the band, as a multiple of the reference.
        high: The upper bound, likewise.

    Returns:
        [B, T] float, nats, with gradient.

    Source: Xu et al. 2025, arXiv:2509.22576.
    """
    floor, ceiling = _entropy_band(entropies, reference, low, high)
    return (floor - entropies).relu() + (entropies - ceiling).relu()


def entropy_band_indicator(
    entropies: Tensor, reference: Tensor | float, low: float, high: float, *, strict: bool = True
) -> Tensor:
    """Return whether the entropy is outside the band of `entropy_band_violation`.

    The result is a constant: it adds to the loss and gives no gradient.

    Args:
        entropies: [B, T] float, nats.
        reference: [B, T] float or a number, nats.
        low: The lower bound of the band, as a multiple of the reference.
        high: The upper bound, likewise.
        strict: Whether a value exactly on a bound is outside.

    Returns:
        [B, T] float, 1 outside and 0 inside; no gradient.

    Source: Xu et al. 2025, arXiv:2509.22576 (its released code).
    """
    floor, ceiling = _entropy_band(entropies, reference, low, high)
    inside = (floor < entropies) & (entropies < ceiling)
    if not strict:
        inside |= (entropies == floor) | (entropies == ceiling)
    return (~inside).to(entropies.dtype)


def _entropy_band(
    entropies: Tensor, reference: Tensor | float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    centre = torch.as_tensor(reference, dtype=entropies.dtype, device=entropies.device).detach()
    return low * centre, high * centre
