"""Sampling of one id per row by inverse CDF in float64, with its logprob and the exact entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

SMALL_VOCABULARY = 4096  # up to it, one product with the whole head is faster than gathering its rows
CHUNK_ELEMENTS = 2**22


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
        _draw_rows(
            _to_numpy(hidden[k : k + rows] @ weight.T),
            uniforms[k : k + rows],
            temperatures[k : k + rows],
            top,
        )
        for k in range(0, len(uniforms), rows)
    ]
    return Draws(
        [token for part in parts for token in part.chosen],
        [value for part in parts for value in part.logprobs],
        [value for part in parts for value in part.entropies],
        [value for part in parts for value in part.confidences],
    )


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


def _draw_rows(logits: Array, uniforms: Array, temperatures: Array, top: int) -> Draws:
    """Sample one index per row of logits [R, K]."""
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
