"""Log-probability and entropy of tokens from hidden states; logits exist for a chunk of tokens at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_NUMBERS = 2**24  # numbers held at once: 64 MB in float32

# Up to this many vocabulary rows per allowed id, a product with all rows beats fetching the allowed ones.
_DENSE_RATIO = 32

Statistics = tuple[Tensor, Tensor]


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Statistics:
    """Log-probability of a target and exact entropy of the distribution it was drawn from, for N tokens.

        z[n] = weight @ hidden[n] / temperature,   p[n] = softmax z[n], over the vocabulary or over the
        allowed ids logprobs[n] = log p[n, targets[n]],        entropies[n] = -sum_v p[n, v] log p[n, v]

    Both have gradients to `hidden` and `weight`; memory, forward and backward, is that of one chunk.

    Args:
        hidden: [N, d] float, the states that predict the targets.
        weight: [V, d] float, the output embedding.
        targets: [N] int64; among the allowed ids where those are given.
        allowed: [N, K] int64 padded with -1, or None for the whole vocabulary.
        temperature: that of sampling.
        chunk: tokens at a time; None chooses by the size of the vocabulary.

    Returns:
        [N] logprobs and [N] entropies in nats, float32 at least.

    Raises:
        ValueError: if the first dimensions disagree.
    """
    if len(targets) != len(hidden) or (allowed is not None and len(allowed) != len(hidden)):
        raise ValueError(
            f"{len(hidden)} hidden states for {len(targets)} targets"
            + ("" if allowed is None else f" and {len(allowed)} rows of allowed ids")
        )
    if allowed is None:
        return _vocabulary_statistics(hidden, weight, targets, temperature, chunk)
    return _chunked_constrained_statistics(hidden, weight, targets, allowed, temperature, chunk)


def _vocabulary_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int | None
) -> Statistics:
    size = chunk or max(1, CHUNK_NUMBERS // len(weight))
    parts = [
        _FullVocabulary.apply(states, weight, wanted, temperature)  # type: ignore[no-untyped-call]
        for states, wanted in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    return _concatenate(parts)


class _FullVocabulary(torch.autograd.Function):
    """Keeps two numbers per token and computes the logits a second time on the way back."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits = _logits(hidden, weight, temperature)
        highest = logits.amax(dim=-1)
        logits -= highest[:, None]
        target = logits.gather(1, targets[:, None]).squeeze(1)
        shares = logits.exp()
        total = shares.sum(dim=-1)
        entropies = total.log() - shares.mul_(logits).sum(dim=-1) / total
        ctx.save_for_backward(hidden, weight, targets, highest + total.log(), entropies)
        ctx.temperature = temperature
        return target - total.log(), entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Chain through dz = g_logprob (onehot - p) - g_entropy p (log p + H)."""
        hidden, weight, targets, log_total, entropies = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        logprobs = _logits(hidden, weight, ctx.temperature).sub_(log_total[:, None])
        slope = logprobs.exp()
        slope.mul_(logprobs.add_(entropies[:, None]).mul_(-by_entropy[:, None]).sub_(by_logprob[:, None]))
        slope.scatter_add_(1, targets[:, None], by_logprob[:, None])
        slope = slope.div_(ctx.temperature).to(hidden.dtype)
        return slope @ weight, slope.T @ hidden, None, None


def _chunked_constrained_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, allowed: Tensor, temperature: float, chunk: int | None
) -> Statistics:
    dense = len(weight) <= _DENSE_RATIO * allowed.shape[1]
    logits_of = _dense_logits if dense else _gathered_logits
    numbers = len(weight) if dense else allowed.shape[1] * weight.shape[1]
    size = chunk or max(1, CHUNK_NUMBERS // max(1, numbers))
    if len(hidden) <= size:
        return _constrained_statistics(logits_of, hidden, weight, targets, allowed, temperature)
    parts = [
        checkpoint(
            _constrained_statistics,
            logits_of,
            *pieces[:1],
            weight,
            *pieces[1:],
            temperature,
            use_reentrant=False,
        )
        for pieces in zip(
            torch.split(hidden, size), torch.split(targets, size), torch.split(allowed, size), strict=True
        )
    ]
    return _concatenate(parts)


def _constrained_statistics(
    logits_of: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor,
    temperature: float,
) -> Statistics:
    absent = allowed < 0
    logits = logits_of(hidden, weight, allowed.clamp(min=0), temperature)
    logprobs = logits.masked_fill(absent, -torch.inf).log_softmax(dim=-1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(absent, 0.0)).sum(dim=-1)
    place = (allowed == targets[:, None]).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return logprobs.gather(1, place).squeeze(1), entropies


def _dense_logits(hidden: Tensor, weight: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    return _logits(hidden, weight, temperature).gather(1, allowed)


def _gathered_logits(hidden: Tensor, weight: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    # The scatter-add behind `embedding` is much faster than the one behind indexing.
    return _at_least_float32(torch.einsum("nd,nkd->nk", hidden, F.embedding(allowed, weight))) / temperature


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _at_least_float32(hidden @ weight.T)
    return logits if temperature == 1.0 else logits / temperature


def _at_least_float32(values: Tensor) -> Tensor:
    """At least float32: a sum of exponentials over a vocabulary is lost in half precision."""
    return values if values.dtype == torch.float64 else values.float()


def _concatenate(parts: list[Statistics]) -> Statistics:
    if len(parts) == 1:
        return parts[0]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
