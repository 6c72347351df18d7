"""Log-probability and entropy of tokens over a whole vocabulary, from logits of one tile at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Numbers of a tile of logits, [tokens, ids]: what a processor's cache holds, or what keeps a GPU busy.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 16384)


def tiled_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of N target tokens and the entropies of their distributions, in nats.

        z[n] = weight @ hidden[n] / temperature[n],   Z[n] = sum_v exp z[n, v],   p = exp(z) / Z
        logprobs[n] = z[n, targets[n]] - log Z[n],    entropies[n] = log Z[n] - sum_v p[n, v] z[n, v]
        dz = g_logprob (onehot - p) - g_entropy p (log p + H)

    Sums over the vocabulary are kept relative to the highest logit so far. Besides the gradients themselves,
    memory is that of one tile and of a few numbers per token.

    Args:
        hidden: The states that predict the targets, [N, d] float.
        weight: The output embedding, [V, d] float.
        targets: The token ids, [N] int64.
        temperature: The sampling temperature, of all tokens or [N] of each.

    Returns:
        [N] log-probabilities and [N] entropies, at least float32.
    """
    found: tuple[Tensor, Tensor] = _Tiles.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return found


class _Tiles(torch.autograd.Function):
    """Statistics that save two numbers per token and compute each tile again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        count = len(hidden)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scale = _scale(temperature, count, hidden.device, wide)
        highest = torch.full((count,), -torch.inf, dtype=wide, device=hidden.device)
        total, moment, target = (torch.zeros_like(highest) for _ in range(3))
        for ids, tokens in _tiles(weight, hidden):
            logits = _logits(hidden, weight, scale, ids, tokens, wide)
            _gather_targets(target[tokens], logits, targets[tokens], ids)
            known = highest[tokens]
            above = torch.maximum(known, logits.amax(dim=1))
            factor = (known - above).exp_()
            logits -= above[:, None]
            weights = logits.exp()
            # sum w (z - highest) moves with the highest logit; the first tile has nothing to move.
            shift = (known - above).mul_(total[tokens]).nan_to_num_(nan=0.0)
            moment[tokens] = (moment[tokens] + shift) * factor + torch.linalg.vecdot(weights, logits)
            total[tokens] = total[tokens] * factor + weights.sum(dim=1)
            highest[tokens] = above
        log_total = total.log()
        entropies = log_total - moment / total
        log_total += highest
        ctx.save_for_backward(hidden, weight, targets, log_total, entropies, scale)
        return target - log_total, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients, each summed at least in float32."""
        hidden, weight, targets, log_total, entropies, scale = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        wide = log_total.dtype
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if want_hidden else None
        # Every tile is written below, unless there are no tokens.
        create = torch.empty_like if len(hidden) else torch.zeros_like
        weight_gradient = create(weight) if want_weight else None
        summed: Tensor | None = None
        for ids, tokens in _tiles(weight, hidden):
            logprobs = _logits(hidden, weight, scale, ids, tokens, wide).sub_(log_total[tokens, None])
            slope = logprobs.exp()
            logprobs.add_(entropies[tokens, None]).mul_(-by_entropy[tokens, None])
            slope.mul_(logprobs.sub_(by_logprob[tokens, None]))
            place, inside = _places(targets[tokens], ids)
            slope.scatter_add_(1, place[:, None], (by_logprob[tokens] * inside)[:, None])
            if scale is not None:
                slope *= scale[tokens, None]
            if hidden_gradient is not None:
                _accumulate(hidden_gradient[tokens], slope, weight[ids])
            if weight_gradient is not None:
                if tokens.start == 0:
                    rows = weight_gradient[ids]
                    summed = rows.zero_() if rows.dtype == wide else torch.zeros_like(rows, dtype=wide)
                assert summed is not None
                _accumulate(summed, slope.T, hidden[tokens])
                if tokens.stop >= len(hidden) and summed.dtype != weight.dtype:
                    weight_gradient[ids] = summed.to(weight.dtype)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, None, None


def _tiles(weight: Tensor, hidden: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles as (ids, tokens); the tokens of an id follow each other."""
    tokens, ids = CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
    for first in range(0, len(weight), ids):
        for start in range(0, len(hidden), tokens):
            yield slice(first, first + ids), slice(start, start + tokens)


def _logits(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, ids: slice, tokens: slice, wide: torch.dtype
) -> Tensor:
    logits = (hidden[tokens] @ weight[ids].T).to(wide)
    return logits if scale is None else logits.mul_(scale[tokens, None])


def _scale(temperature: float | Tensor, count: int, device: torch.device, wide: torch.dtype) -> Tensor | None:
    """Return the factor of each token's logits, [N]; None if all are 1."""
    if isinstance(temperature, Tensor):
        return temperature.to(device, wide).reciprocal()
    return None if temperature == 1.0 else torch.full((count,), 1.0 / temperature, dtype=wide, device=device)


def _places(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Return the columns of the targets in a tile, and which targets are in it; [N] int64 and bool."""
    places = targets - ids.start
    inside = (places >= 0) & (places < ids.stop - ids.start)
    return places.masked_fill_(~inside, 0), inside


def _gather_targets(found: Tensor, logits: Tensor, targets: Tensor, ids: slice) -> None:
    """Write the logits of the targets that are in a tile."""
    places, inside = _places(targets, ids)
    torch.where(inside, logits.gather(1, places[:, None]).squeeze(1), found, out=found)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a sum, without rounding the product to a half precision first."""
    if total.is_cuda and right.dtype != total.dtype:
        torch.addmm(total, left.to(right.dtype), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
