"""The processes that learn together: the rank of this one, and how they exchange values."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from agentrl.errors import AgentRLError, ConfigError

T = TypeVar("T")

# Long enough for the slowest rank's episodes; if a rank dies, torchrun ends the ranks that wait for it.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """One of several processes that must all make the same calls; by default the only one.

    Args:
        index: The rank of this process, from 0. Rank 0 writes the files that only one process may write.
        count: The number of processes.
        group: The process group for their communication; None is the default group.
    """

    index: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Return whether this is rank 0."""
        return self.index == 0

    def new_group(self) -> "Ranks":
        """Return the same ranks with a process group of their own, for use by a second thread of each."""
        if self.count == 1:
            return self
        # Two threads that share a group could pair one's message with the other's.
        return replace(self, group=dist.new_group(timeout=_TIMEOUT, backend="gloo"))

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers over all ranks; their names and order must be equal on every rank."""
        # One message for all of them; float64, so that counts stay exact.
        sums = self.all_reduce(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, sums.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks; it must be picklable."""
        found: list[T] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of items that all ranks have: every `count`-th."""
        return items[self.index :: self.count]

    def merge(self, part: Sequence[T]) -> list[T]:
        """Return all items that `split` distributed, in their original order."""
        parts = self.gather(part)
        size = sum(map(len, parts))
        return [parts[index % self.count][index // self.count] for index in range(size)]

    def raise_on_any_rank(self, work: Callable[[], T]) -> T:
        """Call a function that may fail on some ranks only; every rank then raises the first one's error.

        Args:
            work: The function to call. It must not communicate with other ranks.
        """
        if self.count == 1:
            return work()
        raised: AgentRLError | None = None
        try:
            result = work()
        except AgentRLError as error:
            raised = error
        except Exception as error:  # any other error too, or the other ranks would wait forever
            raised = AgentRLError(f"rank {self.index}: {type(error).__name__}: {error}")
            raised.__cause__ = error
        for found in self.gather(raised):
            if found is not None:
                raise found
        return result

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Call a function on rank 0 only; every rank returns its result or raises its error."""
        done = self.raise_on_any_rank(lambda: work() if self.first else None)
        return cast(T, self.gather(done)[0])


ALONE = Ranks()


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started, if it started any.

    Launchers other than torchrun set the same variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT.

    Args:
        device: The device that all ranks compute on. Of several accelerators, each rank selects the one
            with the number of its local rank.

    Raises:
        ConfigError: If there are fewer accelerators than processes on this machine.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    # NCCL refuses two ranks on one accelerator.
    if device.type == "cuda":
        _select_accelerator(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(_backend(device), timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def ensure_process_group(device: torch.device) -> None:
    """Create a process group of this process alone if it has joined none, since FSDP2 needs one."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _select_accelerator(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"torchrun --nproc-per-node: at least {local_rank + 1} processes on this machine, which has "
            f"{count} accelerators; wanted at most one process per accelerator, or policy.device=cpu"
        )
    torch.cuda.set_device(local_rank)


def _backend(device: torch.device) -> str:
    # gloo as well, since numbers and pickled objects are exchanged from the CPU.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
