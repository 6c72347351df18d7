"""Log-probability, entropy and more of tokens from hidden states, with logits for one chunk at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from agentrl.learn.vocabulary_tiles import tiled_statistics

CHUNK_NUMBERS = 2**24  # numbers held at once: 64 MB in float32

# Up to this many vocabulary rows per allowed id, a product with all rows beats fetching the allowed ones.
_DENSE_RATIO = 32

# Further statistics need about this many times the memory of the logits, so that chunks are smaller.
_EXTRA_NUMBERS = 8

Statistics = tuple[Tensor, ...]
Temperature = float | Tensor  # a number, or one of each token
OfLogits = Callable[[Tensor, Tensor], Tensor]


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor | None = None,
    temperature: Temperature = 1.0,
    chunk: int | None = None,
    extras: Sequence[OfLogits] = (),
) -> Statistics:
    """Return the log-probabilities of N target tokens and the exact entropies of their distributions.

        z[n] = weight @ hidden[n] / temperature[n]
        p[n] = softmax z[n], over the vocabulary or the allowed ids
        logprobs[n] = log p[n, targets[n]],        entropies[n] = -sum_v p[n, v] log p[n, v]

    All have gradients with respect to `hidden` and `weight`. Forward and backward pass need the memory of
    one chunk.

    Args:
        hidden: The states that predict the targets, [N, d] float.
        weight: The output embedding, [V, d] float.
        targets: The token ids, [N] int64; each is among the allowed ids if those are given.
        allowed: The allowed ids, [N, K] int64 padded with -1, or None for the whole vocabulary.
        temperature: The sampling temperature, of all tokens or [N] of each.
        chunk: The number of tokens per chunk, if they are constrained or have `extras`; None chooses it by
            the size of the vocabulary. Other tokens are computed in tiles, see `tiled_statistics`.
        extras: Further functions of z, for the tokens of a chunk: (z [N, V], columns of the targets [N]) ->
            [N] or [N, k]. Of constrained tokens they see the allowed ids only, with -inf where there is none.

    Returns:
        [N] log-probabilities and [N] entropies in nats, at least float32; then the results of `extras`.

    Raises:
        ValueError: If the first dimensions differ.
    """
    if len(targets) != len(hidden) or (allowed is not None and len(allowed) != len(hidden)):
        raise ValueError(
            f"{len(hidden)} hidden states for {len(targets)} targets"
            + ("" if allowed is None else f" and {len(allowed)} rows of allowed ids")
        )
    if allowed is None:
        if not extras:
            return tiled_statistics(hidden, weight, targets, temperature)
        return _vocabulary_statistics(hidden, weight, targets, temperature, chunk, extras)
    return _chunked_constrained_statistics(hidden, weight, targets, allowed, temperature, chunk, extras)


def paired_statistics(
    hidden: Tensor,
    weight: Tensor,
    teacher: tuple[Tensor, Tensor],
    functions: Sequence[OfLogits],
    allowed: Tensor | None = None,
    temperature: Temperature = 1.0,
    chunk: int | None = None,
) -> Statistics:
    """Return functions of the logits of a policy and of its teacher, for N tokens.

    Both logits are those of one chunk of tokens, and are computed again in the backward pass. Gradients flow
    to `hidden` and `weight`; none flows to the teacher.

    Args:
        hidden: The states of the policy, [N, d] float.
        weight: The output embedding of the policy, [V, d] float.
        teacher: The states [N, e] and the output embedding [V, e] of the teacher.
        functions: The functions (z [N, V], the teacher's z [N, V]) -> [N].
        allowed: The allowed ids, as in `token_statistics`; the functions then see those only.
        temperature: The sampling temperature, by which both are divided.
        chunk: The number of tokens per chunk; None chooses it by the size of the vocabulary.
    """
    seen, matrix = (values.detach() for values in teacher)
    dense = allowed is None or len(weight) <= _DENSE_RATIO * allowed.shape[1]
    numbers = len(weight)
    if allowed is not None and not dense:
        numbers = allowed.shape[1] * (weight.shape[1] + seen.shape[1])
    size = chunk or _chunk_size(numbers, functions)
    count = max(1, -(-len(hidden) // size))
    parts = [
        checkpoint(_pair, own, weight, shown, matrix, ids, tempered, dense, functions, use_reentrant=False)
        for own, shown, ids, tempered in zip(
            torch.split(hidden, size),
            torch.split(seen, size),
            [None] * count if allowed is None else torch.split(allowed, size),
            _split(temperature, len(hidden), size),
            strict=True,
        )
    ]
    return _concatenate(parts)


def _pair(
    hidden: Tensor,
    weight: Tensor,
    seen: Tensor,
    matrix: Tensor,
    allowed: Tensor | None,
    temperature: Temperature,
    dense: bool,
    functions: Sequence[OfLogits],
) -> Statistics:
    def logits(states: Tensor, embedding: Tensor) -> Tensor:
        if allowed is None:
            return _logits(states, embedding, temperature)
        found = (_dense_logits if dense else _gathered_logits)(
            states, embedding, allowed.clamp(min=0), temperature
        )
        return found.masked_fill(allowed < 0, -torch.inf)

    own, teacher = logits(hidden, weight), logits(seen, matrix)
    return tuple(function(own, teacher.to(own.dtype)) for function in functions)


def _vocabulary_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Temperature,
    chunk: int | None,
    extras: Sequence[OfLogits],
) -> Statistics:
    size = chunk or _chunk_size(len(weight), extras)
    parts = [
        _FullVocabulary.apply(states, weight, wanted, tempered, extras)  # type: ignore[no-untyped-call]
        for states, wanted, tempered in zip(
            torch.split(hidden, size),
            torch.split(targets, size),
            _split(temperature, len(hidden), size),
            strict=True,
        )
    ]
    return _concatenate(parts)


def _chunk_size(numbers: int, extras: Sequence[OfLogits]) -> int:
    """Return how many tokens a chunk has if each needs so many numbers."""
    return max(1, CHUNK_NUMBERS // max(1, numbers) // (_EXTRA_NUMBERS if extras else 1))


class _FullVocabulary(torch.autograd.Function):
    """Statistics that save two numbers per token and recompute the logits in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Temperature,
        extras: Sequence[OfLogits],
    ) -> Statistics:
        logits = _logits(hidden, weight, temperature)
        found = [function(logits, targets) for function in extras]
        highest = logits.amax(dim=-1)
        logits -= highest[:, None]
        target = logits.gather(1, targets[:, None]).squeeze(1)
        unnormalised = logits.exp()
        total = unnormalised.sum(dim=-1)
        entropies = total.log() - unnormalised.mul_(logits).sum(dim=-1) / total
        ctx.save_for_backward(hidden, weight, targets, highest + total.log(), entropies)
        ctx.temperature, ctx.extras = temperature, extras
        return target - total.log(), entropies, *found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients by dz = g_logprob (onehot - p) - g_entropy p (log p + H), and by autograd."""
        hidden, weight, targets, log_total, entropies = ctx.saved_tensors
        by_logprob, by_entropy, *by_extras = gradients
        logits = _logits(hidden, weight, ctx.temperature)
        further = _gradients(ctx.extras, logits, targets, by_extras)
        logprobs = logits.sub_(log_total[:, None])
        slope = logprobs.exp()
        slope.mul_(logprobs.add_(entropies[:, None]).mul_(-by_entropy[:, None]).sub_(by_logprob[:, None]))
        slope.scatter_add_(1, targets[:, None], by_logprob[:, None])
        for values in further:
            slope += values
        slope = slope.div_(_divisor(ctx.temperature, slope)).to(hidden.dtype)
        return slope @ weight, slope.T @ hidden, None, None, None


def _gradients(
    extras: Sequence[OfLogits], logits: Tensor, targets: Tensor, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of functions of the logits, [N, V] each, with one graph in memory at a time."""
    found: list[Tensor] = []
    for function, gradient in zip(extras, gradients, strict=True):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            values = function(leaf, targets)
        if values.requires_grad:  # not if it is an indicator
            found += torch.autograd.grad(values, leaf, gradient)
    return found


def _chunked_constrained_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor,
    temperature: Temperature,
    chunk: int | None,
    extras: Sequence[OfLogits],
) -> Statistics:
    dense = len(weight) <= _DENSE_RATIO * allowed.shape[1]
    logits_of = _dense_logits if dense else _gathered_logits
    numbers = len(weight) if dense else allowed.shape[1] * weight.shape[1]
    size = chunk or _chunk_size(numbers, extras)
    if len(hidden) <= size:
        return _constrained_statistics(logits_of, hidden, weight, targets, allowed, temperature, extras)
    parts = [
        checkpoint(
            _constrained_statistics,
            logits_of,
            *pieces[:1],
            weight,
            *pieces[1:],
            extras,
            use_reentrant=False,
        )
        for pieces in zip(
            torch.split(hidden, size),
            torch.split(targets, size),
            torch.split(allowed, size),
            _split(temperature, len(hidden), size),
            strict=True,
        )
    ]
    return _concatenate(parts)


def _constrained_statistics(
    logits_of: Callable[[Tensor, Tensor, Tensor, Temperature], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor,
    temperature: Temperature,
    extras: Sequence[OfLogits],
) -> Statistics:
    absent = allowed < 0
    logits = logits_of(hidden, weight, allowed.clamp(min=0), temperature).masked_fill(absent, -torch.inf)
    logprobs = logits.log_softmax(dim=-1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(absent, 0.0)).sum(dim=-1)
    place = (allowed == targets[:, None]).to(torch.uint8).argmax(dim=-1, keepdim=True)
    found = (function(logits, place.squeeze(1)) for function in extras)
    return logprobs.gather(1, place).squeeze(1), entropies, *found


def _dense_logits(hidden: Tensor, weight: Tensor, allowed: Tensor, temperature: Temperature) -> Tensor:
    return _logits(hidden, weight, temperature).gather(1, allowed)


def _gathered_logits(hidden: Tensor, weight: Tensor, allowed: Tensor, temperature: Temperature) -> Tensor:
    # The scatter-add behind `embedding` is much faster than the one behind indexing.
    logits = _at_least_float32(torch.einsum("nd,nkd->nk", hidden, F.embedding(allowed, weight)))
    return logits / _divisor(temperature, logits)


def _logits(hidden: Tensor, weight: Tensor, temperature: Temperature) -> Tensor:
    return temper(hidden @ weight.T, temperature)


def temper(logits: Tensor, temperature: Temperature) -> Tensor:
    """Return logits [N, V], at least float32, divided by the temperature."""
    logits = _at_least_float32(logits)
    if not isinstance(temperature, Tensor) and temperature == 1.0:
        return logits
    return logits / _divisor(temperature, logits)


def _divisor(temperature: Temperature, logits: Tensor) -> Temperature:
    """Return what divides logits [N, V]: a number, or [N, 1] of their dtype."""
    return temperature.to(logits.dtype)[:, None] if isinstance(temperature, Tensor) else temperature


def _split(temperature: Temperature, count: int, size: int) -> Sequence[Temperature]:
    """Return the temperatures of each chunk of `count` tokens."""
    if isinstance(temperature, Tensor):
        return torch.split(temperature, size)
    return [temperature] * max(1, -(-count // size))


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen half precision to float32, since a sum of exponentials over a vocabulary needs it."""
    return values if values.dtype == torch.float64 else values.float()


def _concatenate(parts: list[Statistics]) -> Statistics:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))
