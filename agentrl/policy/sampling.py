"""Sampling of one id per row by inverse CDF, with its logprob and the exact entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Array = np.ndarray[Any, Any]

SMALL_VOCABULARY = 4096  # up to it, one product with the whole head is faster than gathering its rows
CHUNK_ELEMENTS = 2**22  # logits held at once
CACHED_ELEMENTS = 2**18  # of them, logits that a processor's cache holds from one pass to the next
BLOCK = 512  # ids whose weights are summed first, to search the CDF by blocks
LOWEST = -1e4  # a log weight whose weight is 0; unlike -inf, its product with 0 is 0


@dataclass(frozen=True, slots=True)
class Draws:
    """Sampled values, one entry per row; `chosen` is an index into the row's menu, or an id without menus."""

    chosen: list[int]
    logprobs: list[float]
    entropies: list[float]
    confidences: list[float]


def draw(
    hidden: Tensor,
    weight: Tensor,
    menus: Sequence[tuple[int, ...]] | None,
    uniforms: Array,
    temperatures: Array,
    top: int = 0,
) -> Draws:
    """Sample the next id of every row.

    Args:
        hidden: [R, d], the last hidden state of each row.
        weight: [V, d], the output weight.
        menus: The allowed ids of each row; None allows all.
        uniforms: [R] float64 in [0, 1), the random numbers.
        temperatures: [R]; 0 takes the most likely id, with the logprob and entropy of temperature 1.
        top: The number of ids that a confidence is over; 0 measures none.

    Returns:
        Indices or ids, with logprobs and entropies in nats over the allowed ids, after the temperature. A row
        whose logits are not finite has entropy nan. A confidence is the mean of -log p over the `top` most
        likely of the allowed ids, in nats; 0 if none is measured.
    """
    if menus is not None:
        return _draw_rows(_menu_logits(hidden, weight, menus), uniforms, temperatures, top)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    parts = [
        part
        for k in range(0, len(uniforms), rows)
        for part in _draw_ids(
            (hidden[k : k + rows] @ weight.T).float(),
            uniforms[k : k + rows],
            temperatures[k : k + rows],
            top,
        )
    ]
    return Draws(
        [token for part in parts for token in part.chosen],
        [value for part in parts for value in part.logprobs],
        [value for part in parts for value in part.entropies],
        [value for part in parts for value in part.confidences],
    )


def _draw_ids(logits: Tensor, uniforms: Array, temperatures: Array, top: int) -> Iterator[Draws]:
    """Sample one id per row of logits [R, V], which are overwritten; in parts of a few rows.

    Weights are float32 and their sums float64, so that a draw differs from that in float64 only where the
    uniform is within rounding of a step of the CDF.
    """
    on_cpu = logits.device.type == "cpu"
    rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if on_cpu else len(logits)
    for k in range(0, len(logits), rows):
        part = slice(k, k + rows)
        found = draw_rows(
            logits[part],
            torch.from_numpy(uniforms[part]).to(logits.device),
            torch.from_numpy(temperatures[part]).to(logits.device),
            top,
        )
        chosen, *figures = found.cpu().tolist()
        yield Draws([int(token) for token in chosen], *figures)


def draw_rows(logits: Tensor, uniforms: Tensor, temperatures: Tensor, top: int = 0) -> Tensor:
    """Sample one id per row, on the device of the logits.

    Args:
        logits: [R, V] float32, overwritten.
        uniforms: [R] float64 in [0, 1).
        temperatures: [R]; 0 takes the most likely id, with the logprob and entropy of temperature 1.
        top: The number of most likely ids whose confidence is measured; 0 measures none.

    Returns:
        [4, R] float64: the ids, and logprobs, entropies and confidences in nats.
    """
    greedy = temperatures == 0
    scaled = logits.sub_(logits.amax(dim=1, keepdim=True))
    if not bool((temperatures == 1).all()):
        scaled.mul_(torch.where(greedy, 1.0, temperatures).reciprocal().to(logits.dtype)[:, None])
    scaled.clamp_(min=LOWEST)
    shares = scaled.softmax(dim=1)
    log_totals = -shares.amax(dim=1).double().log()  # the likeliest id has weight exp(0)
    chosen = _search(shares, uniforms)
    if bool(greedy.any()):
        chosen = torch.where(greedy, scaled.argmax(dim=1), chosen)
    logprobs = scaled.gather(1, chosen[:, None]).squeeze(1).double() - log_totals
    # sum p log p = sum p s - log Z
    entropies = log_totals - torch.linalg.vecdot(shares, scaled).double()
    confidences = torch.zeros_like(entropies)
    if top:
        likely = scaled.topk(min(top, scaled.shape[1]), dim=1).values.double()
        counted = likely > LOWEST
        surprisals = (log_totals[:, None] - likely).masked_fill(~counted, 0.0)
        confidences = surprisals.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return torch.stack([chosen.double(), logprobs, entropies, confidences])


def _search(shares: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first id at which the sum of the shares [R, V] passes the uniform; [R] int64."""
    rest = -shares.shape[1] % BLOCK
    blocks = functional.pad(shares, (0, rest)).view(len(shares), -1, BLOCK)
    sums = blocks.sum(dim=2).double().cumsum(dim=1)
    passed = (uniforms * sums[:, -1])[:, None]
    block = _first_passing(sums, passed)
    before = functional.pad(sums, (1, 0)).gather(1, block[:, None])
    within = blocks[torch.arange(len(block), device=block.device), block].double()
    place = _first_passing(before + within.cumsum(dim=1), passed)
    return block * BLOCK + place


def _first_passing(sums: Tensor, passed: Tensor) -> Tensor:
    """Return the first place at which sums [R, K] are above a number [R, 1], or the last that adds."""
    # Rounding can leave the end of a CDF just below the draw, which then takes the last id with any weight.
    highest = torch.nextafter(sums[:, -1:], torch.zeros_like(passed))
    return (sums <= torch.minimum(passed, highest)).sum(dim=1).clamp(max=sums.shape[1] - 1)


def _menu_logits(hidden: Tensor, weight: Tensor, menus: Sequence[tuple[int, ...]]) -> Array:
    """Return the logits of the menus, [R, K], padded with -inf."""
    ids = np.array(list(zip_longest(*menus, fillvalue=-1))).T
    if weight.shape[0] <= SMALL_VOCABULARY:
        logits = np.take_along_axis(_to_numpy(hidden @ weight.T), ids.clip(0), axis=1)
    else:
        rows = weight[torch.from_numpy(ids.clip(0)).to(weight.device)]
        logits = _to_numpy(torch.einsum("rd,rkd->rk", hidden, rows))
    logits[ids < 0] = -np.inf
    return logits


def _to_numpy(logits: Tensor) -> Array:
    return logits.float().cpu().numpy().astype(np.float64)


def _draw_rows(logits: Array, uniforms: Array, temperatures: Array, top: int = 0) -> Draws:
    """Sample one index per row of logits [R, K], in float64."""
    greedy = temperatures == 0
    scaled = logits / np.where(greedy, 1.0, temperatures)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        scaled -= scaled.max(axis=1, keepdims=True)
        weights = np.exp(scaled)
        totals = weights.sum(axis=1)
        # sum p log p = sum w s / Z - log Z, where a weight of 0 adds 0 although its s is -inf.
        entropies = np.log(totals) - np.where(weights > 0, weights * scaled, 0.0).sum(axis=1) / totals
        cumulative = weights.cumsum(axis=1)
        chosen = (cumulative <= (uniforms * cumulative[:, -1])[:, None]).sum(axis=1)
    # Rounding can leave the end of a CDF just below the draw, which then takes the last id with any weight.
    last = logits.shape[1] - 1 - (weights > 0)[:, ::-1].argmax(axis=1)
    chosen = np.where(greedy, scaled.argmax(axis=1), np.minimum(chosen, last))
    logprobs = scaled[np.arange(len(chosen)), chosen] - np.log(totals)
    confidences = _confidences(scaled, np.log(totals), top) if top else np.zeros(len(chosen))
    return Draws(chosen.tolist(), logprobs.tolist(), entropies.tolist(), confidences.tolist())


def _confidences(scaled: Array, log_totals: Array, top: int) -> Array:
    """Return the mean of -log p over the `top` most likely ids of each row, or over all that it allows."""
    count = min(top, scaled.shape[1])
    likely = np.partition(scaled, -count, axis=1)[:, -count:]
    allowed = np.isfinite(likely)
    sums = np.where(allowed, log_totals[:, None] - np.where(allowed, likely, 0.0), 0.0).sum(axis=1)
    return np.asarray(sums / allowed.sum(axis=1).clip(1))
