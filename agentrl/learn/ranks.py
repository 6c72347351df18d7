"""The processes that learn together: which of them this is, and how they tell each other what they hold."""

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

# That of the slowest rank's episodes; whoever waits for a rank that died is ended by torchrun.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """A process among its equals; alone unless told otherwise. All of them must make the same calls.

    Args:
        index: of this process, from 0; the first writes what only one may write.
        count: of processes.
        group: that they tell each other through; None is the one that all joined.
    """

    index: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.index == 0

    def apart(self) -> "Ranks":
        """The same processes with words of their own, so that a thread of each can speak beside the first."""
        if self.count == 1:
            return self
        return replace(self, group=dist.new_group(timeout=_PATIENCE, backend="gloo"))

    def total(self, values: Tensor) -> Tensor:
        """Add up what the ranks hold, in place; every rank has the same sum."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def totals(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The same of numbers, whose names and order must be equal on every rank."""
        sums = self.total(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, sums.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """What each rank holds, by rank; picklable."""
        found: list[T] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def deal(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of what all ranks have: the part of this one."""
        return items[self.index :: self.count]

    def collect(self, dealt: Sequence[T]) -> list[T]:
        """All that was dealt, in the order that it had before."""
        hands = self.gather(dealt)
        size = sum(map(len, hands))
        return [hands[place % self.count][place // self.count] for place in range(size)]

    def raise_on_any_rank(self, work: Callable[[], T]) -> T:
        """Do what may fail on some ranks only; then every rank raises what the first of those raised.

        Args:
            work: that tells the other ranks nothing.
        """
        if self.count == 1:
            return work()
        told: AgentRLError | None = None
        try:
            result = work()
        except AgentRLError as error:
            told = error
        except Exception as error:  # whatever it is, the others wait to be told
            told = AgentRLError(f"rank {self.index}: {type(error).__name__}: {error}")
            told.__cause__ = error
        for found in self.gather(told):
            if found is not None:
                raise found
        return result

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Have the first rank do what only one may do; all get its result, or raise what it raised."""
        done = self.raise_on_any_rank(lambda: work() if self.first else None)
        return cast(T, self.gather(done)[0])


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one; alone where it started none.

    Launchers other than torchrun set the same variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT.

    Args:
        device: that all compute on; of several accelerators, each takes that of its place on the machine.

    Raises:
        ConfigError: when there are fewer accelerators than processes on this machine.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    if device.type == "cuda":
        _take_accelerator(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(_backend(device), timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def ensure_group(device: torch.device) -> None:
    """Have a process group, of this process alone where it has joined none: FSDP2 wants one."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _take_accelerator(place: int) -> None:
    there = torch.cuda.device_count()
    if place >= there:
        raise ConfigError(
            f"torchrun --nproc-per-node: at least {place + 1} processes on this machine, which has {there} "
            "accelerators; start as many as those, or set policy.device=cpu"
        )
    torch.cuda.set_device(place)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
