"""Uncertainty of tokens and turns, from entropy and confidence together (T2PO)."""

import math

import torch
from torch import Tensor

from agentrl.algorithms.functional.shapes import same_shape

_LEAST = 1e-12  # keeps the logarithm of an M of 0 finite


def token_uncertainty(
    entropies: Tensor, confidences: Tensor, *, entropy_weight: float, vocabulary: int
) -> Tensor:
    """Return the uncertainty of every decision of a reply.

        M[t] = a H[t] / ln V + (1 - a) (1 - (C[t] - min C) / (max C - min C))

    Minimum and maximum are over the given decisions. If they are equal, the fraction is 0.

    Args:
        entropies: [T] float, H, nats.
        confidences: [T] float, C, nats, the mean -log p of the most likely tokens: high where one of them is
            nearly certain.
        entropy_weight: a, within [0, 1].
        vocabulary: V; below 2 (unknown), entropies stay in nats.

    Returns:
        [T] float.

    Raises:
        ValueError: If shapes disagree.

    Source: arXiv:2605.02178.
    """
    same_shape("confidences", confidences, "entropies", entropies)
    if not len(entropies):
        return entropies.clone()
    scale = math.log(vocabulary) if vocabulary > 1 else 1.0
    width = confidences.max() - confidences.min()
    level = (confidences - confidences.min()) / torch.where(width > 0, width, 1.0)
    return entropy_weight * entropies / scale + (1 - entropy_weight) * (1 - level)


def turn_uncertainty(uncertainties: Tensor) -> float:
    """Return the geometric mean of M over the decisions of a turn; 0 without any.

    Source: arXiv:2605.02178.
    """
    if not len(uncertainties):
        return 0.0
    return float(uncertainties.clamp(min=_LEAST).log().mean().exp())


def is_flat(uncertainties: Tensor, *, window: int, threshold: float) -> bool:
    """Return whether M has moved by less than the threshold from token to token, on average over a window.

        mean of |M[t] - M[t - 1]| over the last `window` tokens < threshold

    With fewer than `window` + 1 tokens it has not.

    Source: arXiv:2605.02178.
    """
    if len(uncertainties) <= window:
        return False
    return bool(uncertainties[-window - 1 :].diff().abs().mean() < threshold)
