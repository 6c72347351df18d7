"""Goals of a shop: prices, price limits, instructions, their order and their splits.

`Random(price_seed)` and `Random(233)` are used in the order in which the original uses the global generator:
prices of the products with a range, price limits of the goals, order of the goals.
"""

import hashlib
import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from agentrl.errors import ConfigError
from agentrl_envs.webshop.catalogue import Catalogue, Instruction, Product

LIMITS = tuple(10.0 * step for step in range(1, 100))
NO_LIMIT = 1_000_000.0
ORDER_SEED = 233
SPLITS = ("train", "dev", "test")
TEST, DEV = 500, 1500  # goals 0 to 499, 500 to 1499, and all others
HELD_OUT = 10  # one product in this many is for test, and one for dev


@dataclass(frozen=True, slots=True)
class Goal:
    """An instruction to buy a product.

    Attributes:
        number: The position in the order of goals.
        product: The product that the goal is about.
        instruction: The text of the instruction.
        attributes: The attributes that it asks for.
        options: The (name, value) of the options that it asks for; the name is None in human instructions.
        limit: The highest price in dollars; `NO_LIMIT` if there is none.
        weight: The relative frequency with which it should be drawn.
    """

    number: int
    product: Product
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[tuple[str | None, str], ...]
    limit: float
    weight: float


@dataclass(frozen=True, slots=True)
class _Row:
    """The goals about one product with the same price limit: one per combination of its options."""

    product: Product
    limit: float
    count: int
    said: Instruction | None


class Goals(Sequence[Goal]):
    """Lazy sequence of the goals in their order; there may be millions.

    Args:
        catalogue: The products.
        kind: "synthetic" or "human".
        price_seed: The seed of prices and price limits.

    Attributes:
        prices: asin -> price in dollars.
        skipped: Reason -> number of instructions without a goal for it.
    """

    def __init__(self, catalogue: Catalogue, kind: str, price_seed: int) -> None:
        rng = Random(price_seed)
        self.prices = {
            product.asin: product.pricing[0] if len(product.pricing) == 1 else rng.uniform(*product.pricing)
            for product in catalogue.products
        }
        self.skipped: Counter[str] = Counter()
        self._rows = tuple(
            self._human(catalogue, rng) if kind == "human" else self._synthetic(catalogue, rng)
        )
        self._firsts = [0, *accumulate(row.count for row in self._rows)]
        order = list(range(self._firsts.pop()))
        Random(ORDER_SEED).shuffle(order)
        self._order = array("Q", order)
        asked: Counter[str] = Counter()
        for row in self._rows:
            for attribute in row.product.instruction_attributes:
                asked[attribute] += row.count
        self._weights = [_weight(row, asked) for row in self._rows]

    def _human(self, catalogue: Catalogue, rng: Random) -> Iterator[_Row]:
        for product in catalogue.products:
            for said in catalogue.human.get(product.asin, ()):
                if said.attributes:
                    yield _Row(product, draw_limit(self.prices[product.asin], rng), 1, said)
                else:
                    self.skipped["instruction without attributes"] += 1

    def _synthetic(self, catalogue: Catalogue, rng: Random) -> Iterator[_Row]:
        for product in catalogue.products:
            if product.instruction is None:
                continue
            if not product.instruction_attributes:
                self.skipped["instruction without attributes"] += 1
                continue
            limit = draw_limit(self.prices[product.asin], rng)
            count = math.prod(len(values) for values in product.options.values())
            if count:
                yield _Row(product, limit, count, None)
            else:
                self.skipped["an option without values"] += 1

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        place = self._order[number]
        at = bisect_right(self._firsts, place) - 1
        row = self._rows[at]
        number = range(len(self))[number]
        price = "" if row.limit == NO_LIMIT else f", and price lower than {row.limit:.2f} dollars"
        if row.said is not None:
            options: tuple[tuple[str | None, str], ...] = tuple((None, value) for value in row.said.options)
            text, attributes = row.said.text.strip(".") + price, row.said.attributes
        else:
            options = _combination(row.product.options, place - self._firsts[at])
            said = ", and ".join(f"{name}: {value}" for name, value in options)
            text = f"{row.product.instruction}{' with ' + said if said else ''}{price}"
            attributes = row.product.instruction_attributes
        return Goal(number, row.product, text, attributes, options, row.limit, self._weights[at])

    def weight(self, number: int) -> float:
        """Return the weight of a goal."""
        return self._weights[self._row(number)]

    def asin(self, number: int) -> str:
        """Return the asin of the product that a goal is about."""
        return self._rows[self._row(number)].product.asin

    def _row(self, number: int) -> int:
        return bisect_right(self._firsts, self._order[number]) - 1

    def split(self, rule: str) -> dict[str, Sequence[int]]:
        """Split the goals into train, dev and test.

        Args:
            rule: "index", the original's: goals 0 to 499 are for test, 500 to 1499 for dev, and a product can
                be in all three. "product": one product in ten is for test and one for dev, with all its
                goals.

        Returns:
            Split -> numbers of its goals, ascending.

        Raises:
            ConfigError: There are too few goals or products.
        """
        if rule == "index":
            if len(self) <= DEV:
                raise ConfigError(
                    f"split_rule: 'index' leaves no training goals: there are {len(self)}, and dev ends at "
                    f"number {DEV - 1}; use 'product'"
                )
            return {"train": range(DEV, len(self)), "dev": range(TEST, DEV), "test": range(TEST)}
        asins = sorted(
            {row.product.asin for row in self._rows}, key=lambda asin: hashlib.sha256(asin.encode()).digest()
        )
        if len(asins) < len(SPLITS):
            raise ConfigError(f"split_rule: 'product' needs goals for 3 products, there are {len(asins)}")
        each = max(1, len(asins) // HELD_OUT)
        held_out = dict.fromkeys(asins[:each], "test") | dict.fromkeys(asins[each : 2 * each], "dev")
        numbers = {split: array("Q") for split in SPLITS}
        for number in range(len(self)):
            numbers[held_out.get(self.asin(number), "train")].append(number)
        return dict(numbers)


class Draw:
    """Weighted random choice of goals.

    Args:
        goals: All goals.
        numbers: The numbers of the goals to draw from.
        faithful: Whether to reproduce the original's off-by-one error: it never draws the first goal, draws
            each other goal with the weight of the one before it, and the last with its own weight, too.
    """

    def __init__(self, goals: Goals, numbers: Sequence[int], faithful: bool = False) -> None:
        self._numbers = numbers
        self._sums = list(accumulate(goals.weight(number) for number in numbers))
        self._offset = int(faithful)

    def __call__(self, uniform: float) -> int:
        """Return the number of a goal for a uniform random number in [0, 1)."""
        at = bisect_right(self._sums, uniform * self._sums[-1]) + self._offset
        return self._numbers[min(at, len(self._numbers) - 1)]


def draw_limit(price: float, rng: Random) -> float:
    """Draw two of the next four multiples of ten, below 1000, that are above a price; take the higher."""
    above = bisect_right(LIMITS, price)
    candidates = LIMITS[above : above + 4]
    return max(rng.sample(candidates, 2)) if len(candidates) >= 2 else NO_LIMIT


def _combination(options: Any, number: int) -> tuple[tuple[str | None, str], ...]:
    """Return a combination of option values by its number; names are sorted, and the last varies fastest."""
    chosen = []
    for name in sorted(options, reverse=True):
        number, at = divmod(number, len(options[name]))
        chosen.append((name, options[name][at]))
    return tuple(reversed(chosen))


def _weight(row: _Row, asked: Counter[str]) -> float:
    if row.said is not None:
        return 1.0
    attributes = row.product.instruction_attributes
    return sum(1.0 / asked[attribute] for attribute in attributes) / len(attributes)
