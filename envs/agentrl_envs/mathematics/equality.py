"""Compare an answer with the correct one.

They are equal if they are of one kind, such as number, list, set, interval, equation, matrix or text, and
equal as such.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from random import Random

from agentrl_envs.mathematics.kinds import (
    Answer,
    Based,
    Call,
    Expression,
    I,
    Items,
    Matrix,
    Name,
    Named,
    Number,
    Ratio,
    Relation,
    Value,
    Words,
    names,
    variables,
)
from agentrl_envs.mathematics.reader import read, says_words, words
from agentrl_envs.mathematics.regions import region, subject
from agentrl_envs.mathematics.values import (
    BITS,
    PRECISION,
    SAMPLE_PRECISION,
    Irrational,
    Point,
    TooLargeError,
    Undefined,
    exact,
    infinite,
    numeric,
)

TOLERANCE = Fraction(1, 10**9)  # relative error allowed if the correct answer is a decimal

QUICK_BITS = 2_048  # largest numbers computed without a time limit
POINTS = 9  # number of points at which expressions with variables are compared
FEWEST_POINTS = 3  # number of these points at which both expressions must have a value
CHOICES = frozenset("ABCDEFGH")


class NeedsTimeError(Exception):
    """The comparison needs irrational or large numbers, and so a process with a time limit."""


def same(gold: str, answer: str, rounded_digits: int | None, quick: bool = False) -> bool:
    """Return whether an answer is equal to the correct one.

    Numbers are compared exactly, or within `TOLERANCE` if `gold` is a decimal.

    Args:
        gold: The correct answer.
        answer: The answer without any text around it.
        rounded_digits: The number of significant digits, correctly rounded, from which a decimal counts as
            equal to a fraction or an irrational number; None for never.
        quick: Whether to do only work that is bounded by the length of the texts.

    Raises:
        NeedsTimeError: The comparison is not possible with `quick`.
    """
    right = read(gold)
    if right is None or isinstance(right, Words):
        left, told = words(gold), words(answer)
        return left.casefold() == told.casefold() if right or says_words(gold) else left == told
    match right:
        case Value(Name(name)) if len(name) == 1 and words(answer).casefold() == name.casefold():
            said = read(answer)
            return name in CHOICES or isinstance(said, Words) or said == right
    comparison = _Comparison(rounded_digits, quick)
    letters = isinstance(right, Value) and not variables(right.expression)
    readings = dict.fromkeys((read(answer), read(answer, True)) if letters else (read(answer),))
    return any(said is not None and comparison.agree(right, said) for said in readings)


class _Comparison:
    def __init__(self, rounded_digits: int | None, quick: bool) -> None:
        self._rounded_digits, self._quick = rounded_digits, quick
        self._logarithm = 0
        self._known: dict[tuple[Expression, int], Point] = {}

    def agree(self, gold: Answer, said: Answer) -> bool:
        """Return whether two answers are of one kind and equal."""
        try:
            return self._agree(gold, said)
        except (Undefined, TooLargeError):
            return False

    def _agree(self, gold: Answer, said: Answer) -> bool:
        match gold, said:
            case Value(), Value():
                return self._values(gold, said)
            case Value(), Named(_, value):
                return self._agree(gold, value)
            case Value(), Relation(sides, operators):
                return set(operators) == {"="} and all(self._agree(gold, side) for side in sides)
            case Words(text), Words(other):
                return text == other
            case (Words(text), Value(Name(name))) | (Value(Name(name)), Words(text)):
                return text == name.casefold()
            case Based(), Based():
                return gold == said
            case (Based(digits, 10), Value()):
                return self._values(Value(Number(Fraction(digits))), said)
            case (Value(), Based(digits, 10)):
                return self._values(gold, Value(Number(Fraction(digits))))
            case Matrix(rows), Matrix(others):
                return [len(row) for row in rows] == [len(row) for row in others] and all(
                    self._expressions(left, right)
                    for row, other in zip(rows, others, strict=True)
                    for left, right in zip(row, other, strict=True)
                )
            case Ratio(parts), Ratio(others):
                return self._proportional(parts, others)
            case Named(name, value), Named(other, told) if name == other and self._agree(value, told):
                return True
            case Named() | Relation(), Named() | Relation():
                return self._equations(gold, said) or self._regions(gold, said)
            case Named(_, value), (Value() | Items() | Based()):
                return self._agree(value, said)
            case Items(), Named(_, (Items() | Value()) as value):
                return self._agree(gold, value)
            case Items(), Items() if self._items(gold, said):
                return True
        return self._regions(gold, said)

    # Numbers

    def _values(self, gold: Value, said: Value) -> bool:
        if (gold.unit and said.unit and not gold.unit.agrees(said.unit)) or (
            (gold.percent and said.unit) or (gold.unit and said.percent)
        ):
            return False
        left, right = gold.expression, said.expression
        if self._expressions(left, right):
            return True
        if gold.percent == said.percent:
            return False
        hundredth = Fraction(1, 100)
        return self._expressions(
            _scaled(left, hundredth) if gold.percent else left,
            _scaled(right, hundredth) if said.percent else right,
        )

    def _expressions(self, gold: Expression, said: Expression) -> bool:
        self._logarithm = 0
        if self._alike(gold, said):
            return True
        if not (_has_plain_logarithm(gold) or _has_plain_logarithm(said)):
            return False
        self._logarithm = 10
        return self._alike(gold, said)

    def _alike(self, gold: Expression, said: Expression) -> bool:
        if infinite(gold) or infinite(said):
            return infinite(gold) == infinite(said)
        if variables(gold, said):
            return self._functions(gold, said)
        left, right = self._point(gold), self._point(said)
        if left.close(right):
            return True
        tiny = Fraction(1, 1 << PRECISION // 2)
        if (left.bits or right.bits) and max(left.size(), right.size()) < tiny:
            # Terms may have cancelled: a difference that is zero shrinks with the precision.
            finer = self._finer(gold) - self._finer(said)
            return finer.size() <= (left - right).size() * tiny
        if left.imaginary or right.imaginary:
            return False
        difference, decimal = abs(left.real - right.real), _decimal(gold)
        if decimal is not None:
            return difference <= TOLERANCE * abs(decimal.value)
        return self._rounds(left, difference, _decimal(said))

    def _rounds(self, gold: Point, difference: Fraction, decimal: Number | None) -> bool:
        """Return whether a decimal is a correctly rounded number that is allowed to be rounded."""
        if decimal is None or self._rounded_digits is None or decimal.digits < self._rounded_digits:
            return False
        return difference <= decimal.step / 2 and (gold.bits > 0 or gold.real.denominator > 1)

    def _point(self, expression: Expression, at: Mapping[str, Fraction] | None = None) -> Point:
        key = expression, self._logarithm
        if at is None and key in self._known:
            return self._known[key]
        try:
            point = Point(exact(expression, at or {}, QUICK_BITS if self._quick else BITS))
        except (Irrational, TooLargeError) as error:
            if self._quick:
                raise NeedsTimeError from error
            if isinstance(error, TooLargeError):
                raise
            point = numeric(expression, at or {}, self._logarithm, SAMPLE_PRECISION if at else PRECISION)
        if at is None:
            self._known[key] = point
        return point

    def _finer(self, expression: Expression) -> Point:
        return numeric(expression, {}, self._logarithm, 2 * PRECISION)

    def _functions(self, gold: Expression, said: Expression) -> bool:
        """Return whether two expressions with variables are equal wherever both are real."""
        complex_ = I in {*names(gold), *names(said)}
        compared = 0
        for left, right in self._at_points(gold, said):
            if left is None and right is None:
                continue
            if left is None or right is None:
                return False
            if not left.close(right):
                if not complex_ and left.imaginary and right.imaginary:
                    continue
                return False
            compared += 1
        return compared >= FEWEST_POINTS

    def _at_points(self, *expressions: Expression) -> Iterator[list[Point | None]]:
        found = variables(*expressions)
        rng = Random(",".join(found))
        for place in range(POINTS):
            at = {name: _coordinate(rng, place) for name in found}
            yield [self._defined(one, at) for one in expressions]

    def _defined(self, expression: Expression, at: Mapping[str, Fraction]) -> Point | None:
        try:
            return self._point(expression, at)
        except Undefined:
            return None

    def _proportional(self, gold: Sequence[Expression], said: Sequence[Expression]) -> bool:
        if len(gold) != len(said):
            return False
        left, right = [self._point(one) for one in gold], [self._point(one) for one in said]
        return all(one.size() for one in right) and all(
            (left[0] * other).close(one * right[0]) for one, other in zip(left, right, strict=True)
        )

    # Equations and inequalities

    def _equations(self, gold: Answer, said: Answer) -> bool:
        """Return whether one equation or inequality is a multiple of the other."""
        left, right = _difference(gold), _difference(said)
        if left is None or right is None or left[0] != right[0]:
            return False
        if variables(left[1]) != variables(right[1]) or not variables(left[1]):
            return False
        pairs = [pair for pair in self._at_points(left[1], right[1]) if None not in pair]
        points = [(one, other) for one, other in pairs if one is not None and other is not None]
        points = [(one, other) for one, other in points if one.size() or other.size()]
        if len(points) < FEWEST_POINTS or not all(one.size() and other.size() for one, other in points):
            return False
        ordered = left[0] not in ("=", "ne")
        return all(
            (one * far).close(near * other) for (one, other), (near, far) in pairwise(points)
        ) and not (ordered and any((one * other).real <= 0 for one, other in points))

    def _regions(self, gold: Answer, said: Answer) -> bool:
        left, right = region(gold, self._point), region(said, self._point)
        if left is None or right is None or len(left) != len(right):
            return False
        if None not in (subject(gold), subject(said)) and subject(gold) != subject(said):
            return False
        return all(
            one.closed == other.closed and self._expressions(one.expression, other.expression)
            for interval, told in zip(left, right, strict=True)
            for one, other in zip(interval, told, strict=True)
        )

    # Lists, sets and tuples

    def _items(self, gold: Items, said: Items) -> bool:
        unordered = ("", "{}")
        if gold.brackets in unordered and said.brackets in unordered:
            return len(gold.items) == len(said.items) and self._unordered(gold.items, said.items)
        wanted: Sequence[Answer] = gold.items
        told: Sequence[Answer] = said.items
        if (gold.brackets, said.brackets) == ("()", ""):
            told = _by_name(told)  # x = 1, y = 2 is the point (1, 2)
        elif (gold.brackets, said.brackets) == ("", "()"):
            wanted = _by_name(wanted)
        elif gold.brackets != said.brackets:
            return False
        return len(wanted) == len(told) > 0 and all(map(self._agree, wanted, told))

    def _unordered(self, gold: Sequence[Answer], said: Sequence[Answer]) -> bool:
        wanted, told = _names(gold), _names(said)
        if wanted and told and wanted != told:  # x = 1, x = 2 against x_1 = 1, x_2 = 2
            gold, said = [_without_index(item) for item in gold], [_without_index(item) for item in said]
        elif not wanted and len(_names([_without_index(item) for item in said])) > 1:
            return all(map(self.agree, gold, said))
        left = list(said)
        for item in gold:
            place = next((place for place, other in enumerate(left) if self.agree(item, other)), None)
            if place is None:
                return False
            del left[place]
        return True


def _names(items: Sequence[Answer]) -> set[str]:
    return {item.name for item in items if isinstance(item, Named)}


def _by_name(items: Sequence[Answer]) -> Sequence[Answer]:
    """Return named items in the order of their names; none if the names are not complete and unique."""
    named = [item for item in items if isinstance(item, Named)]
    if len(_names(named)) < len(items):
        return ()
    return sorted(named, key=lambda item: item.name)


def _without_index(item: Answer) -> Answer:
    return Named(item.name.partition("_")[0], item.value) if isinstance(item, Named) else item


def _decimal(expression: Expression) -> Number | None:
    """Return an expression that is a decimal with its sign as a number, None for any other expression."""
    match expression:
        case Number(_, digits) if digits:
            return expression
        case Call("-" | "+" as sign, (*zero, Number(value, digits, step))) if digits:
            if not zero:
                return Number(-value if sign == "-" else value, digits, step)
    return None


def _scaled(expression: Expression, by: Fraction) -> Expression:
    decimal = _decimal(expression)
    if decimal is not None:
        return Number(decimal.value * by, decimal.digits, decimal.step * by)
    return Call("*", (expression, Number(by)))


def _has_plain_logarithm(expression: Expression) -> bool:
    match expression:
        case Call("log", (_,)):
            return True
        case Call(_, arguments):
            return any(map(_has_plain_logarithm, arguments))
    return False


def _coordinate(rng: Random, place: int) -> Fraction:
    """Draw a coordinate: whole numbers at first, then positive numbers, then numbers of either sign."""
    if place < POINTS // 3:
        return Fraction(rng.randint(2, 12))
    sign = 1 if place < 2 * POINTS // 3 else rng.choice((-1, 1))
    return sign * Fraction(rng.randint(1, 1 << 20), (1 << 18) + 2 * rng.randint(0, 1 << 10) + 1)


def _difference(answer: Answer) -> tuple[str, Expression] | None:
    """Return the operator and the difference of the sides; inequalities are turned to "<" or "le"."""
    match answer:
        case Named(name, Value(right, None, False)):
            return "=", Call("+", (Name(name), Call("-", (right,))))
        case Relation((Value(left, None, False), Value(right, None, False)), (operator,)):
            if operator in (">", "ge"):
                left, right, operator = right, left, "<" if operator == ">" else "le"
            return operator, Call("+", (left, Call("-", (right,))))
    return None
