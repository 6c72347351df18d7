"""The training tasks of a run, of one environment or of several, and the order in which they are drawn."""

import random
from collections.abc import Container, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import count
from math import gcd, lcm
from typing import Any, Protocol, overload

from agentrl.env.names import named_task
from agentrl.seeds import derive_seed


class Order(Protocol):
    """Endless order of tasks, which can be entered anywhere."""

    def __getitem__(self, cursor: int) -> str:
        """Return the task at a place."""
        ...


class TaskOrder:
    """Order in which every task is drawn once per epoch; it depends on the seed, and no list is kept."""

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self._tasks, self._seed = tasks, seed

    def __getitem__(self, cursor: int) -> str:
        size = len(self._tasks)
        epoch, place = divmod(cursor, size)
        stride = derive_seed(self._seed, "stride", epoch) % size
        while gcd(stride, size) != 1:
            stride += 1
        return self._tasks[(derive_seed(self._seed, "offset", epoch) + place * stride) % size]


class MixedTasks(Sequence[str]):
    """Tasks of several environments, one after the other; the id of each begins with its environment's name.

    Args:
        tasks: The tasks of each environment, by its name.
        weights: How many tasks are drawn from each, relative to the others.
    """

    def __init__(self, tasks: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> None:
        self._parts = {name: _NamedTasks(name, own) for name, own in tasks.items()}
        self._weights = dict(weights)

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Return the tasks of each environment, by its name."""
        return self._parts

    def only(self, names: Container[str]) -> "MixedTasks":
        """Return the tasks of some of the environments, with the weights that they have."""
        kept = [name for name in self._parts if name in names]
        return MixedTasks({name: self._parts[name].own for name in kept}, self._weights)

    def turns(self) -> "WeightedTurns":
        """Return the order in which the environments take turns."""
        return WeightedTurns({name: self._weights[name] for name in self._parts})

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        for part in self._parts.values():
            if 0 <= place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(f"task {index} of {len(self)}")

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))


class WeightedTurns:
    """Order in which names take turns by weight: the next is the one furthest behind its share.

    No name is ever more than one turn ahead of its share. With whole weights, every sum-of-weights turns hold
    each name exactly as often as its weight says, and then the order begins again; other weights count as the
    decimal numbers that they are written as.

    >>> turns = WeightedTurns({"a": 2, "b": 1, "c": 1})
    >>> [turns[place][0] for place in range(8)]
    ['a', 'b', 'c', 'a', 'a', 'b', 'c', 'a']

    Args:
        weights: The positive weight of each name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        scale = lcm(*(weight.denominator for weight in exact.values()))
        whole = {name: int(weight * scale) for name, weight in exact.items()}
        common = gcd(*whole.values())
        self._weights = {name: weight // common for name, weight in whole.items()}
        self._period = sum(self._weights.values())
        self._turns: list[tuple[str, int]] = []  # of one period, as far as it was asked for
        self._taken = dict.fromkeys(weights, 0)
        self._behind = dict.fromkeys(weights, 0)  # in turns times the period

    def __getitem__(self, place: int) -> tuple[str, int]:
        """Return the name whose turn it is, and how many turns it has had before."""
        periods, place = divmod(place, self._period)
        while len(self._turns) <= place:
            self._turns.append(self._next())
        name, turn = self._turns[place]
        return name, periods * self._weights[name] + turn

    def _next(self) -> tuple[str, int]:
        for name, weight in self._weights.items():
            self._behind[name] += weight
        name = max(self._behind, key=lambda each: self._behind[each])
        self._behind[name] -= self._period
        self._taken[name] += 1
        return name, self._taken[name] - 1


class MixedOrder:
    """Order in which environments take turns by weight, and every task of each is drawn once per epoch."""

    def __init__(self, tasks: MixedTasks, seed: int) -> None:
        self._turns = tasks.turns()
        self._orders = {name: TaskOrder(part, derive_seed(seed, name)) for name, part in tasks.parts.items()}

    def __getitem__(self, cursor: int) -> str:
        name, turn = self._turns[cursor]
        return self._orders[name][turn]


def tasks_by_environment(tasks: Sequence[str]) -> list[Sequence[str]]:
    """Return the tasks of each environment."""
    return list(tasks.parts.values()) if isinstance(tasks, MixedTasks) else [tasks]


def tasks_of(tasks: Sequence[str], environments: Container[str]) -> Sequence[str]:
    """Return the tasks of some of several environments; those of a single one unchanged."""
    return tasks.only(environments) if isinstance(tasks, MixedTasks) else tasks


def task_order(tasks: Sequence[str], seed: int) -> Order:
    """Return the order in which training draws its tasks."""
    return MixedOrder(tasks, seed) if isinstance(tasks, MixedTasks) else TaskOrder(tasks, seed)


def random_tasks(tasks: Sequence[str], *seed: Any) -> Iterator[str]:
    """Draw tasks with replacement without end, from several environments in the turns of their weights.

    Args:
        tasks: The tasks.
        seed: What the draws depend on.
    """
    if not isinstance(tasks, MixedTasks):
        draw = random.Random(derive_seed(*seed))
        while True:
            yield tasks[draw.randrange(len(tasks))]
    draws = {name: random_tasks(part, *seed, name) for name, part in tasks.parts.items()}
    turns = tasks.turns()
    for place in count():
        yield next(draws[turns[place][0]])


class _NamedTasks(Sequence[str]):
    """Tasks of one environment, under the ids that they have among those of several."""

    def __init__(self, name: str, own: Sequence[str]) -> None:
        self.name, self.own = name, own

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [named_task(self.name, task) for task in self.own[index]]
        return named_task(self.name, self.own[index])

    def __len__(self) -> int:
        return len(self.own)
