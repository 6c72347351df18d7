"""Kinds of answers, as the parser builds them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Union

from agentrl_envs.mathematics.units import Unit

PI, E, I, INFINITY = "\\pi", "e", "i", "\\infty"  # noqa: E741
CONSTANTS = frozenset({PI, E, I, INFINITY})


@dataclass(frozen=True, slots=True)
class Number:
    """A numeral.

    Attributes:
        value: The exact value.
        digits: The number of significant digits if it is written as a decimal, else 0.
        step: One unit in the last place of a decimal.
    """

    value: Fraction
    digits: int = 0
    step: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Name:
    """A constant (`CONSTANTS`) or a variable."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """An operation or a function, such as "+", "^" or "sin", and its arguments."""

    function: str
    arguments: tuple["Expression", ...]


Expression = Number | Name | Call


@dataclass(frozen=True, slots=True)
class Value:
    """A number or an expression, with the unit or percent sign after it."""

    expression: Expression
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with an explicit base, such as 1011_2."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Named:
    """A value and its name, as in x = 3, f(2) = 3 or area = 3."""

    name: str
    value: "Answer"


@dataclass(frozen=True, slots=True)
class Items:
    """A list (no brackets), a set, a tuple, or an interval.

    Attributes:
        brackets: The brackets: "", "{}", "()", "[]", "[)" or "(]".
        items: The items.
        either: Whether the items of a list are joined by "or".
    """

    brackets: str
    items: tuple["Answer", ...]
    either: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """The union of sets or, with `difference`, the first set without the others."""

    parts: tuple["Answer", ...]
    difference: bool = False


@dataclass(frozen=True, slots=True)
class Reals:
    """All real numbers."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of relations such as 0 <= x < 1, with one operator fewer than sides."""

    sides: tuple["Answer", ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of expressions."""

    rows: tuple[tuple[Expression, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio such as 3:4, which is not a division."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """A text in lower case."""

    text: str


Answer = Union[Value, Based, Named, Items, Joined, Reals, Relation, Matrix, Ratio, Words]  # noqa: UP007


def names(expression: Expression) -> Iterator[str]:
    """Yield the names in an expression, constants included."""
    match expression:
        case Name(name):
            yield name
        case Call(arguments=arguments):
            for argument in arguments:
                yield from names(argument)


def variables(*expressions: Expression) -> list[str]:
    """Return the variables of expressions, sorted and without repeats."""
    return sorted({name for one in expressions for name in names(one)} - CONSTANTS)
