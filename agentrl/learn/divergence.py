"""Divergence of the distributions that two lists of hidden states give; logits of one chunk at a time."""

import torch
from torch import Tensor

from agentrl.algorithms.functional.divergence import symmetric_divergence, taken_divergence
from agentrl.learn.fused import CHUNK_NUMBERS, Temperature, temper

_COPIES = 6  # arrays of the size of the logits that are held at once


def state_divergence(
    hidden: Tensor,
    others: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor | None = None,
    temperature: Temperature = 1.0,
    *,
    taken: bool = False,
) -> Tensor:
    """Return how far the distributions after two lists of states are apart; [N] nats, without gradient.

    Args:
        hidden: The states of the first, [N, d].
        others: The states of the second, [N, d].
        weight: The output embedding, [V, d].
        targets: The tokens that were taken, [N] int64.
        allowed: The allowed ids, [N, K] int64 padded with -1, or None for the whole vocabulary.
        temperature: The sampling temperature, of all tokens or [N] of each.
        taken: Whether only the token that was taken counts, see `taken_divergence`.
    """
    size = max(1, CHUNK_NUMBERS // (_COPIES * max(1, len(weight))))
    found = []
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        tempered = temperature[part] if isinstance(temperature, Tensor) else temperature
        both = [temper(states[part] @ weight.T, tempered) for states in (hidden, others)]
        if allowed is not None:
            # The allowed ids as a mask of the vocabulary; the padding marks one column too many, cut off.
            ids = torch.where(allowed[part] < 0, len(weight), allowed[part])
            shape = (len(ids), len(weight) + 1)
            barred = torch.ones(shape, dtype=torch.bool, device=ids.device).scatter_(1, ids, False)[:, :-1]
            both = [logits.masked_fill(barred, -torch.inf) for logits in both]
        one, other = (logits.log_softmax(dim=-1) for logits in both)
        if taken:
            at = targets[part, None]
            found.append(taken_divergence(one.gather(1, at).squeeze(1), other.gather(1, at).squeeze(1)))
        else:
            found.append(symmetric_divergence(one, other))
    return torch.cat(found) if found else hidden.new_zeros(0)
