"""Which rows share a forward pass. It does not change the result, since a forward pass has no padding."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from agentrl.data.batch import Batch
from agentrl.learn.ranks import Ranks
from agentrl.seeds import derive_seed


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Split rows into micro-batches of at most `budget` tokens, longest first; a longer row stands alone.

    Args:
        lengths: The number of tokens of each row, [B] int64; rows of length 0 are left out.
        budget: The largest number of tokens of a micro-batch.

    Returns:
        The row numbers of each micro-batch, int64; each row occurs once.
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
    """Return the micro-batches of this rank; all ranks have equally many, of about as many tokens.

    Args:
        lengths: The number of tokens of each row, [B] int64, equal on every rank.
        budget: The largest number of tokens of a micro-batch.
        ranks: The ranks that share the work.

    Returns:
        Row numbers with a weight: 1, or 0 for a filler. Sharded ranks must run equally many forward passes.
    """
    sizes = lengths.tolist()
    assigned = [torch.zeros_like(lengths) for _ in range(ranks.count)]
    loads = [0] * ranks.count
    rows = sorted((row for row, size in enumerate(sizes) if size), key=lambda row: -sizes[row])
    for row in rows:  # longest first, to the rank with the fewest tokens so far
        least = loads.index(min(loads))
        assigned[least][row] = sizes[row]
        loads[least] += sizes[row]
    parts = [micro_batches(own_lengths, budget) for own_lengths in assigned]
    own = parts[ranks.index]
    fillers = max(map(len, parts)) - len(own)
    # The shortest row makes the cheapest filler.
    return [(part, 1.0) for part in own] + [(torch.tensor(rows[-1:]), 0.0)] * fillers


def mini_batches(
    batch: Batch, count: int, step: int, epoch: int, *, whole_groups: bool = False
) -> Iterator[Tensor]:
    """Split trajectories into `count` nearly equal mini-batches; all rows of one trajectory stay together.

    The order is a hash of episode id, step and epoch. It differs between epochs, and depends neither on the
    order of rows nor on a generator's state.

    Args:
        batch: The batch to split.
        count: The number of mini-batches.
        step: The training step.
        epoch: The epoch.
        whole_groups: Split groups instead, so that all trajectories of one group stay together.

    Yields:
        The row numbers of a mini-batch, int64, ascending; empty mini-batches are left out.
    """
    groups, members = batch.groups.tolist(), dict[int, list[int]]()
    for index in sorted(set(batch.trajectory.tolist())):
        members.setdefault(groups[index] if whole_groups else index, []).append(index)

    def draw(unit: int) -> tuple[int, int]:
        return min((derive_seed(batch.episodes[index].id, step, epoch), index) for index in members[unit])

    present = sorted(members, key=draw if count > 1 else None)
    owners = (batch.group if whole_groups else batch.trajectory).cpu()
    for part in _split_evenly(present, count):
        rows = torch.isin(owners, torch.tensor(part, dtype=torch.int64)).nonzero().squeeze(1)
        if len(rows):
            yield rows


def _split_evenly(items: Sequence[int], count: int) -> list[Sequence[int]]:
    bounds = [round(index * len(items) / count) for index in range(count + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]
