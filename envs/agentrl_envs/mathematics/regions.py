"""Sets of real numbers as lists of intervals: intervals, inequalities, unions and finite sets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from agentrl_envs.mathematics.kinds import (
    INFINITY,
    Answer,
    Call,
    Expression,
    Items,
    Joined,
    Name,
    Named,
    Number,
    Reals,
    Relation,
    Value,
    variables,
)
from agentrl_envs.mathematics.values import Irrational, Point, Undefined, exact, infinite

_ENDLESS = Name(INFINITY)
_PLACES = (Fraction(10007, 3), Fraction(-8191, 5), Fraction(131_071, 11))  # test points for straight lines
_FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}


@dataclass(frozen=True, slots=True)
class End:
    """An end of an interval.

    Attributes:
        expression: The end as written.
        value: The value; None at infinity.
        side: -1 or 1 at infinity, else 0.
        closed: Whether the end belongs to the interval.
    """

    expression: Expression
    value: Point | None
    side: int
    closed: bool

    def below(self, other: "End") -> bool:
        """Return whether this end is strictly below another one."""
        if self.value is None or other.value is None:
            return self.side < other.side
        return not self.value.close(other.value) and self.value.real < other.value.real


Interval = tuple[End, End]
Region = list[Interval]
Evaluate = Callable[[Expression], Point]


def region(answer: Answer, evaluate: Evaluate) -> Region | None:
    """Return the intervals of an answer, disjoint and ascending; None if it is not a set of numbers.

    Raises:
        Undefined: The answer has the form of a set but is invalid, such as [1, 0).
    """
    parts = _parts(answer, evaluate)
    return None if parts is None else _united(parts)


def subject(answer: Answer) -> str | None:
    """Return the variable whose values an answer describes, such as x for x < 3; None if there is none."""
    match answer:
        case Named(name):
            return name
        case Relation(sides):
            found = {name for side in sides if isinstance(side, Value) for name in variables(side.expression)}
            return found.pop() if len(found) == 1 else None
        case Items("", (first, *_)):
            return subject(first)
    return None


def _parts(answer: Answer, evaluate: Evaluate) -> Region | None:
    match answer:
        case Reals():
            return [(_end(Call("-", (_ENDLESS,)), False, evaluate), _end(_ENDLESS, False, evaluate))]
        case Named(_, (Items() | Joined() | Reals()) as value):
            return _parts(value, evaluate)
        case Items("{}", items):
            if not all(isinstance(item, Value) and not variables(item.expression) for item in items):
                return None
            ends = [_end(item.expression, True, evaluate) for item in items if isinstance(item, Value)]
            return [(end, end) for end in ends]
        case Items(("()" | "[]" | "[)" | "(]") as brackets, (Value(low), Value(high))):
            if variables(low, high):
                return None
            return [
                _interval(_end(low, brackets[0] == "[", evaluate), _end(high, brackets[1] == "]", evaluate))
            ]
        case Items("", items, either):
            if (
                not all(isinstance(item, Relation) for item in items)
                or len({subject(item) for item in items}) > 1
            ):
                return None
            found = [_parts(item, evaluate) for item in items]
            if any(part is None for part in found):
                return None
            regions = [part for part in found if part is not None]
            return [interval for part in regions for interval in part] if either else _common(regions)
        case Joined(sets, difference):
            found = [_parts(one, evaluate) for one in sets]
            if any(part is None for part in found):
                return None
            regions = [part for part in found if part is not None]
            if difference:
                return _common([regions[0], *(_complement(part, evaluate) for part in regions[1:])])
            return [interval for part in regions for interval in part]
        case Relation(sides, operators):
            return _inequality(sides, operators, evaluate)
    return None


def _inequality(sides: tuple[Answer, ...], operators: tuple[str, ...], evaluate: Evaluate) -> Region | None:
    expressions = [side.expression for side in sides if isinstance(side, Value)]
    places = [place for place, one in enumerate(expressions) if variables(one)]
    if len(expressions) < len(sides) or len(places) != 1 or not set(operators) <= set(_FLIPPED):
        return None
    place = places[0]
    if len(sides) > 3 or (len(sides) == 3 and place != 1):
        return None
    bounds = []
    if place > 0:
        bounds.append((_FLIPPED[operators[place - 1]], expressions[place - 1]))
    if place < len(operators):
        bounds.append((operators[place], expressions[place + 1]))
    match expressions[place], bounds:
        case Call("abs", (inner,)), [(operator, bound)] if operator != "ne":
            bounds = [(operator, bound), (_FLIPPED[operator], Call("-", (bound,)))]
            outside = operator in (">", "ge")
            if evaluate(bound).real <= 0:
                return None
            line = _line(inner)
        case _:
            outside, line = False, _line(expressions[place])
    if line is None:
        return None
    regions = [_beyond(operator, bound, line, evaluate) for operator, bound in bounds]
    return [interval for region_ in regions for interval in region_] if outside else _common(regions)


def _beyond(operator: str, bound: Expression, line: tuple[Fraction, Fraction], evaluate: Evaluate) -> Region:
    """Return the region in which a line is above or below a bound."""
    slope, start = line
    if slope < 0:
        operator = _FLIPPED[operator]
    if slope != 1 or start:
        bound = Call("*", (Call("+", (bound, Number(-start))), Number(1 / slope)))
    end = _end(bound, operator in ("le", "ge"), evaluate)
    if end.value is None:
        raise Undefined
    below, above = (
        (_end(Call("-", (_ENDLESS,)), False, evaluate), end),
        (end, _end(_ENDLESS, False, evaluate)),
    )
    return [below, above] if operator == "ne" else [below] if operator in ("<", "le") else [above]


def _line(expression: Expression) -> tuple[Fraction, Fraction] | None:
    """Return slope and intercept of a line a x + b, None if an expression is not a line."""
    if isinstance(expression, Name):
        return Fraction(1), Fraction(0)
    name, *more = variables(expression)
    if more:
        return None
    try:
        start, *others = (exact(expression, {name: Fraction(x)}) for x in (0, *_PLACES))
    except (Irrational, Undefined):
        return None
    slope = (others[0] - start) / _PLACES[0]
    straight = all(value == start + slope * place for value, place in zip(others, _PLACES, strict=True))
    return (slope, start) if straight and slope else None


def _end(expression: Expression, closed: bool, evaluate: Evaluate) -> End:
    side = infinite(expression)
    if side:
        return End(expression, None, side, False)
    value = evaluate(expression)
    if value.imaginary:
        raise Undefined
    return End(expression, value, 0, closed)


def _interval(low: End, high: End) -> Interval:
    if not low.below(high) and not (low.closed and high.closed and not high.below(low)):
        raise Undefined
    return low, high


def _united(intervals: Iterable[Interval]) -> Region:
    """Merge intervals that touch or overlap, in ascending order."""
    found: Region = []
    for low, high in sorted(intervals, key=lambda interval: _place(interval[0])):
        if found:
            before, last = found[-1]
            touches = not last.below(low) and (low.below(last) or low.closed or last.closed)
            if touches:
                more = last.below(high) or (not high.below(last) and high.closed)
                found[-1] = before, high if more else last
                continue
        found.append((low, high))
    return found


def _place(end: End) -> tuple[int, Fraction, bool]:
    return end.side, end.value.real if end.value else Fraction(0), not end.closed


def _common(regions: list[Region]) -> Region:
    found = regions[0]
    for other in regions[1:]:
        met = []
        for (low, high), (low_, high_) in product(found, other):
            begin = low if low_.below(low) or (not low.below(low_) and not low.closed) else low_
            end = high if high.below(high_) or (not high_.below(high) and not high.closed) else high_
            if begin.below(end) or (begin.closed and end.closed and not end.below(begin)):
                met.append((begin, end))
        found = met
    return found


def _complement(region_: Region, evaluate: Evaluate) -> Region:
    below, above = _end(Call("-", (_ENDLESS,)), False, evaluate), _end(_ENDLESS, False, evaluate)
    ends = [below]
    for low, high in _united(region_):
        ends += [_turned(low), _turned(high)]
    ends.append(above)
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return [(low, high) for low, high in pairs if low.below(high) or (low.closed and high.closed)]


def _turned(end: End) -> End:
    return End(end.expression, end.value, end.side, not end.closed and end.value is not None)
