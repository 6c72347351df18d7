"""What the customers of a shop want: prices, price limits, goals, their order and their splits.

All is drawn from `Random(price_seed)` and `Random(233)` in the order in which the original draws it from the
global generator: prices of the products with a range, limits of the goals, the goals' order.
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
HELD_OUT = 10  # one in so many products is for test, one for dev


@dataclass(frozen=True, slots=True)
class Goal:
    """One product to buy, as a customer says it.

    Attributes:
        number: its place in the order of goals.
        product: what would be bought by someone who knows.
        instruction: what the customer says.
        attributes: what it asks for.
        options: (name, value) of the options that it asks for; a person does not say the name, it is None.
        limit: the highest price; `NO_LIMIT` where there is none.
        weight: how often it should be drawn, compared with the others.
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
    """The goals about one product that share a limit: one per combination of its options."""

    product: Product
    limit: float
    count: int
    said: Instruction | None


class Goals(Sequence[Goal]):
    """The goals in their order, made when asked for: there may be millions.

    Args:
        catalogue: the shop.
        kind: "synthetic" or "human".
        price_seed: what prices and limits are drawn from.

    Attributes:
        prices: asin -> price.
        skipped: reason -> how many instructions gave no goal for it.
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
        """The weight of a goal."""
        return self._weights[self._row(number)]

    def asin(self, number: int) -> str:
        """The product that a goal is about."""
        return self._rows[self._row(number)].product.asin

    def _row(self, number: int) -> int:
        return bisect_right(self._firsts, self._order[number]) - 1

    def split(self, rule: str) -> dict[str, Sequence[int]]:
        """Divide the goals among train, dev and test.

        Args:
            rule: "index", the original's: goals 0 to 499 are for test, 500 to 1499 for dev. A product can be
                in all three. "product": one product in ten is for test and one for dev, with all its goals.

        Returns:
            split -> numbers of its goals, in their order.

        Raises:
            ConfigError: there are not enough goals or products for that.
        """
        if rule == "index":
            if len(self) <= DEV:
                raise ConfigError(
                    f"split_rule: 'index' leaves no goals to train on: there are {len(self)}, dev ends with "
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
    """Draws goals by their weights.

    Args:
        goals: all of them.
        numbers: those to draw from.
        faithful: draw as the original does, which is one off: never the first goal, each other with the
            weight of the one before it, the last with its own as well.
    """

    def __init__(self, goals: Goals, numbers: Sequence[int], faithful: bool = False) -> None:
        self._numbers = numbers
        self._sums = list(accumulate(goals.weight(number) for number in numbers))
        self._offset = int(faithful)

    def __call__(self, uniform: float) -> int:
        """Number of a goal, from a number of [0, 1)."""
        at = bisect_right(self._sums, uniform * self._sums[-1]) + self._offset
        return self._numbers[min(at, len(self._numbers) - 1)]


def draw_limit(price: float, rng: Random) -> float:
    """Draw two of the next four multiples of ten, below 1000, that are above a price; take the higher."""
    above = bisect_right(LIMITS, price)
    candidates = LIMITS[above : above + 4]
    return max(rng.sample(candidates, 2)) if len(candidates) >= 2 else NO_LIMIT


def _combination(options: Any, number: int) -> tuple[tuple[str | None, str], ...]:
    """The choice with a number, of all choices in order: names sorted, the last one's values turn fastest."""
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
