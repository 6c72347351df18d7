"""Attention over packed sequences of unequal length, registered with transformers under `PACKED`.

The linear layers of a model see tokens [1, N] without padding; only attention arranges queries, keys and
values by sequence. With a `KVCache` it reads the keys and values of earlier calls from there. Calls without a
layout are passed on to `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agentrl.errors import RequirementError

PACKED = "agentrl_packed"
DENSE_SPAN = 1.25  # the first slots are read in place if there are at most so many times those in use
ROW_COST = 12  # of a row of a block, in tokens; see `_cuts`
BLOCK_COST = 100  # of a block, in tokens
WINDOW_CHUNK = 512  # the fewest queries per chunk of sliding-window attention
Array = np.ndarray[Any, Any]


class _Scatter(torch.autograd.Function):
    """Copy rows [N, d] to distinct places of a zeroed [size, d]; the backward pass only copies too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        """Return the filled [size, d]."""
        ctx.save_for_backward(places)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the rows."""
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """Invert `_Scatter`; autograd's own backward of a gather adds row by row, which is slower."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """Return the rows at `places`."""
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of all rows."""
        (places,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.size, grads[0].shape[1]).index_copy_(0, places, grads[0]), None


_scatter = cast(Callable[[Tensor, Tensor, int], Tensor], _Scatter.apply)
_gather = cast(Callable[[Tensor, Tensor], Tensor], _Gather.apply)


class AttentionLayout(Protocol):
    """Layout of the tokens [N] of a forward pass: their sequences, and which tokens they attend to."""

    @property
    def longest(self) -> int:
        """Return the number of tokens in the longest sequence."""
        ...

    @property
    def positions(self) -> Tensor:
        """Return the position of each token in its sequence, [N] int64."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Compute causal attention within each sequence.

        Args:
            layer: The index of the layer.
            query: The queries, [1, H, N, D].
            key: The keys, [1, Hkv, N, D].
            value: The values, [1, Hkv, N, D].
            scaling: The factor on the scores; None takes 1 / sqrt(D).
            window: The number of tokens that a token sees, itself included; None is no limit.

        Returns:
            The weighted values, [1, N, H, D].
        """
        ...


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Layout of whole sequences: token n lies at `places[n]` of a padded [batch * longest] grid."""

    batch: int
    longest: int
    positions: Tensor  # [N] int64, the position of each token in its sequence
    places: Tensor | None  # [N] int64; None where every sequence is equally long

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Compute causal attention within each sequence; see `AttentionLayout.attend`."""
        attention = partial(
            F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        states = self._to_grid(query), self._to_grid(key), self._to_grid(value)
        # Padding is at the end of each row, where the causal mask hides it from all real tokens.
        if window is None or self.longest <= window:
            out = attention(*states, is_causal=True)
        else:
            out = _attend_window(attention, *states, window)
        rows = out.transpose(1, 2).reshape(self.batch * self.longest, -1)
        if self.places is not None:
            rows = _gather(rows, self.places)
        return rows.view(1, rows.shape[0], query.shape[1], -1)

    def _to_grid(self, states: Tensor) -> Tensor:
        heads, width = states.shape[1], states.shape[3]
        rows = states[0].transpose(0, 1).reshape(-1, heads * width)
        if self.places is not None:
            rows = _scatter(rows, self.places, self.batch * self.longest)
        return rows.view(self.batch, self.longest, heads, width).transpose(1, 2)


def _attend_window(
    attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, window: int
) -> Tensor:
    """Attend in chunks of queries, each to the keys in reach, so that no mask is [longest, longest]."""
    longest, step = query.shape[2], max(window, WINDOW_CHUNK)
    place = torch.arange(longest, device=query.device)
    parts = []
    for start in range(0, longest, step):
        end, first = min(start + step, longest), max(0, start - window + 1)
        back = place[start:end, None] - place[first:end]
        seen = key[:, :, first:end], value[:, :, first:end]
        parts.append(attention(query[:, :, start:end], *seen, attn_mask=(back >= 0) & (back < window)))
    return torch.cat(parts, dim=2)


def packed_layout(lengths: Tensor, device: torch.device) -> PackedLayout:
    """Return the layout of packed sequences of `lengths` [B] int64."""
    counts = lengths.cpu().numpy()
    longest = int(counts.max(initial=0))
    within = positions_within(counts)
    places = None
    if not (counts == longest).all():
        places = torch.from_numpy(np.repeat(np.arange(len(counts)) * longest, counts) + within).to(device)
    return PackedLayout(len(counts), longest, torch.from_numpy(within).to(device), places)


def positions_within(counts: Array, starts: Array | int = 0) -> Array:
    """Return consecutive numbers for each of several runs: counts (2, 3), starts (5, 0) give 5 6 0 1 2."""
    ends = np.cumsum(counts)
    within: Array = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return within


class KVCache:
    """Keys and values by slot: per layer [slots, length, Hkv, D], so that writing a token copies one row.

    Every entry is always finite: a masked entry has weight 0, and 0 times inf is nan.
    """

    def __init__(self) -> None:
        self.slots = 0
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, length: int) -> None:
        """Grow to at least `slots` sequences of `length` tokens, keeping the contents."""
        if slots <= self.slots and length <= self.length:
            return
        self.slots, self.length = max(slots, self.slots), max(length, self.length)
        for layer, pair in self._layers.items():
            self._layers[layer] = (self._grown(pair[0]), self._grown(pair[1]))

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy a sequence of `length` tokens into other slots."""
        for pair in self._layers.values():
            for states in pair:
                states[targets, :length] = states[source, :length].clone()  # torch refuses overlapping copies

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the storage of a layer, allocated at first use to fit `key` and `value` [1, Hkv, N, D]."""
        if layer not in self._layers:
            self._layers[layer] = (self._empty(key), self._empty(value))
        return self._layers[layer]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, self.length, like.shape[1], like.shape[3])

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.slots, self.length, *old.shape[2:])
        new[: old.shape[0], : old.shape[1]] = old
        return new


@dataclass(frozen=True, slots=True)
class _Block:
    """Some of the tokens as a grid [rows * chunk]; row b reads slot `slots[b]`, or slot b without `slots`."""

    rows: int
    chunk: int
    longest: int  # tokens of its longest sequence, chunk included
    # [rows * chunk] int64, the token at each place, arbitrary at empty ones; None: all tokens, in order
    tokens: Tensor | None
    slots: Tensor | None  # [rows] int64
    first: Tensor  # [rows] int64, the number of tokens before the chunk
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by the layer's attention window

    def mask(self, window: int | None) -> Tensor:
        """Return the additive mask [rows, 1, chunk, longest], 0 or -inf, shared by layers of equal window."""
        window = None if window is None or self.longest <= window else window
        if window not in self.masks:
            self.masks[window] = _causal_mask(self.first, self.chunk, self.longest, window)
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class CachedLayout:
    """Layout of chunks of tokens that extend cached sequences.

    Chunks differ in length, and one grid as wide as the longest would be mostly padding. So the first few
    tokens of every chunk form one block, and the rest of the longer chunks form others.
    """

    cache: KVCache
    longest: int
    positions: Tensor  # [N] int64
    writes: Tensor  # [N] int64 into the [slots * length] cache
    blocks: tuple[_Block, ...]
    places: Tensor | None  # [N] int64 into the concatenated blocks; None where one block holds all in order

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Store the new keys and values in the cache, then attend to it; see `AttentionLayout.attend`."""
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        keys, values = self.cache.layer(layer, key, value)
        keys.view(-1, kv_heads, width).index_copy_(0, self.writes, key[0].transpose(0, 1))
        values.view(-1, kv_heads, value.shape[3]).index_copy_(0, self.writes, value[0].transpose(0, 1))
        queries = query[0].transpose(0, 1).reshape(-1, kv_heads, heads // kv_heads, width)
        parts = [_attend_block(block, queries, keys, values, scaling, window) for block in self.blocks]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.places is not None:
            rows = rows.index_select(0, self.places)
        return rows.view(1, rows.shape[0], heads, -1)


def _attend_block(
    block: _Block, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attend from queries [N, Hkv, G, D] to the cache; return [rows * chunk, H * D]."""
    # The G query heads that share a key are laid along the query length, so that the cache is read once
    # and not once per head.
    if block.tokens is not None:
        queries = queries.index_select(0, block.tokens)
    _, kv_heads, group, width = queries.shape
    grid = queries.view(block.rows, block.chunk, kv_heads, group, width).permute(0, 2, 1, 3, 4)
    mask = block.mask(window).to(queries.dtype)
    out = F.scaled_dot_product_attention(
        grid.reshape(block.rows, kv_heads, block.chunk * group, width),
        _read(keys, block),
        _read(values, block),
        attn_mask=mask if group == 1 else mask.repeat_interleave(group, dim=2),
        scale=scaling,
    )
    split = out.view(block.rows, kv_heads, block.chunk, group, -1)
    return split.permute(0, 2, 1, 3, 4).reshape(block.rows * block.chunk, -1)


def _read(storage: Tensor, block: _Block) -> Tensor:
    """Return the cached states that a block attends to, [rows, Hkv, longest, D]."""
    used = storage[:, : block.longest]
    rows = used[: block.rows] if block.slots is None else used.index_select(0, block.slots)
    return rows.transpose(1, 2)


def cached_layout(
    cache: KVCache, slots: Array, past: Array, counts: Array, device: torch.device
) -> CachedLayout:
    """Return the layout of chunks that extend cached sequences.

    Args:
        cache: The cache of the sequences.
        slots: [R] int64, the slot of each sequence, ascending.
        past: [R] int64, the number of tokens that each slot holds.
        counts: [R] int64, the number of tokens in each chunk.
        device: The device of the model.
    """
    starts = np.cumsum(counts) - counts
    bounds = _cuts(counts)
    blocks: list[_Block] = []
    places = np.empty(int(counts.sum()), dtype=np.int64)
    size = 0
    for begin, end in pairwise(bounds):
        rows = np.flatnonzero(counts > begin)
        taken = np.minimum(counts[rows], end) - begin
        block, tokens, at = _block(
            slots[rows], past[rows] + begin, taken, starts[rows] + begin, len(places), device
        )
        blocks.append(block)
        places[tokens] = at + size
        size += block.rows * block.chunk
    positions = positions_within(counts, past)
    in_order = len(blocks) == 1 and blocks[0].tokens is None
    return CachedLayout(
        cache=cache,
        longest=int((past + counts).max()),
        positions=torch.from_numpy(positions).to(device),
        writes=torch.from_numpy(positions + np.repeat(slots * cache.length, counts)).to(device),
        blocks=tuple(blocks),
        places=None if in_order else torch.from_numpy(places).to(device),
    )


def _block(
    slots: Array, past: Array, counts: Array, starts: Array, total: int, device: torch.device
) -> tuple[_Block, Array, Array]:
    """Build a block with one row per chunk; also return which of `total` tokens it takes, and their places.

    Where the slots in use are nearly all of the first ones, the unused slots between them become empty rows,
    which costs less than copying the keys and values of those in use.
    """
    span = int(slots[-1]) + 1
    dense = span <= DENSE_SPAN * len(slots) + 1
    size, rows = (span, slots) if dense else (len(slots), np.arange(len(slots)))
    chunk, longest = int(counts.max()), int((past + counts).max())
    tokens, places = positions_within(counts, starts), positions_within(counts, rows * chunk)
    at = None
    if not len(tokens) == size * chunk == total:
        grid = np.zeros(size * chunk, dtype=np.int64)
        grid[places] = tokens
        at = torch.from_numpy(grid).to(device)
    first = np.zeros(size, dtype=np.int64)
    first[rows] = past
    block = _Block(
        rows=size,
        chunk=chunk,
        longest=longest,
        tokens=at,
        slots=None if dense else torch.from_numpy(slots).to(device),
        first=torch.from_numpy(first).to(device),
    )
    return block, tokens, places


def _cuts(counts: Array) -> list[int]:
    """Return where to cut chunks into blocks: [0, 3, 40] gives one of the first 3 tokens, one of the next 37.

    A row of a block costs about as much as ROW_COST tokens, a block about as much as BLOCK_COST tokens.
    Dynamic programming finds the cheapest cuts among a few quantiles of the lengths.
    """
    ordered = np.sort(counts)
    size = len(ordered)
    ends = sorted({int(ordered[(size - 1) * k // 8]) for k in range(9)})
    # The number of rows with tokens after each end.
    left = [size, *(size - np.searchsorted(ordered, ends, side="right")).tolist()]
    ends.insert(0, 0)
    best: list[tuple[float, list[int]]] = [(0.0, [0])]
    for k in range(1, len(ends)):
        best.append(
            min(
                (best[j][0] + left[j] * (ROW_COST + ends[k] - ends[j]) + BLOCK_COST, [*best[j][1], ends[k]])
                for j in range(k)
            )
        )
    return best[-1][1]


def _causal_mask(first: Tensor, chunk: int, longest: int, window: int | None) -> Tensor:
    """Return the mask [rows, 1, chunk, longest], 0 or -inf, of chunks after `first` [rows] tokens."""
    # Queries past the end of a short chunk see stale entries, but their outputs are never read.
    place = torch.arange(max(chunk, longest), device=first.device)
    last_seen = first[:, None] + place[:chunk]
    hidden = place[:longest] > last_seen[:, :, None]
    if window is not None:  # clamped, since a row that sees nothing gives nan
        hidden |= place[:longest] <= last_seen.clamp(max=longest - 1)[:, :, None] - window
    return torch.zeros(hidden.shape, device=first.device).masked_fill_(hidden, -torch.inf)[:, None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers, which passes `layout` through the model's keyword arguments.

    Raises:
        RequirementError: If the model asks for what packed attention lacks, or for dropout in training.
    """
    if layout is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    extra = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extra:
        raise RequirementError(f"the model's attention uses {', '.join(extra)}, which packed attention lacks")
    if module.training and kwargs.get("dropout", 0.0):
        raise RequirementError(
            f"attention dropout is {kwargs['dropout']} in the model's config.json, wanted 0: "
            "sampled and trained logprobs would differ"
        )
    layer = cast(int, module.layer_idx)
    return layout.attend(layer, query, key, value, scaling, sliding_window), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)
