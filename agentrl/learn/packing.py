"""Which rows go through the policy together. No result depends on it: a forward pass holds no padding."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from agentrl.data.batch import Batch
from agentrl.learn.ranks import Ranks
from agentrl.seeds import derive_seed


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Cut rows into parts of at most `budget` tokens, longest first; a longer row is a part of its own.

    Args:
        lengths: [B] int64, tokens of each row; rows of length 0 are left out.
        budget: tokens.

    Returns:
        Row numbers, int64, each row once.
    """
    parts: list[list[int]] = []
    room = 0
    sizes = lengths.tolist()
    for row in sorted((row for row, size in enumerate(sizes) if size), key=lambda row: -sizes[row]):
        if not parts or sizes[row] > room:
            parts.append([])
            room = budget
        parts[-1].append(row)
        room -= sizes[row]
    return [torch.tensor(part) for part in parts]


def rank_micro_batches(lengths: Tensor, budget: int, ranks: Ranks) -> list[tuple[Tensor, float]]:
    """The micro-batches of this rank: as many as every other has, of about as many tokens.

    Args:
        lengths: as for `micro_batches`, equal on every rank.
        budget: likewise.
        ranks: that share the work.

    Returns:
        Row numbers with a weight: 1, or 0 for one that this rank goes through only to keep step with others.
    """
    sizes = lengths.tolist()
    hands = [torch.zeros_like(lengths) for _ in range(ranks.count)]
    loads = [0] * ranks.count
    rows = sorted((row for row, size in enumerate(sizes) if size), key=lambda row: -sizes[row])
    for row in rows:
        least = loads.index(min(loads))
        hands[least][row] = sizes[row]
        loads[least] += sizes[row]
    parts = [micro_batches(hand, budget) for hand in hands]
    own = parts[ranks.index]
    fillers = max(map(len, parts)) - len(own)
    return [(part, 1.0) for part in own] + [(torch.tensor(rows[-1:]), 0.0)] * fillers


def mini_batches(batch: Batch, count: int, step: int, epoch: int) -> Iterator[Tensor]:
    """Deal trajectories out to `count` nearly equal parts, anew in each epoch; all rows of one stay together.

    The order is a hash of episode id, step and epoch: it depends on neither the order of rows nor a
    generator's state.

    Returns:
        Row numbers, int64, ascending; parts without rows are left out.
    """
    present = sorted(set(batch.trajectory.tolist()))
    if count > 1:
        present.sort(key=lambda index: (derive_seed(batch.episodes[index].id, step, epoch), index))
    owners = batch.trajectory.cpu()
    for part in _split_evenly(present, count):
        rows = torch.isin(owners, torch.tensor(part, dtype=torch.int64)).nonzero().squeeze(1)
        if len(rows):
            yield rows


def _split_evenly(items: Sequence[int], count: int) -> list[Sequence[int]]:
    bounds = [round(index * len(items) / count) for index in range(count + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]
