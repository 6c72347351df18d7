"""Values of expressions: exact fractions, or approximations with thousands of bits if irrational.

Both are bounded: numbers that would be too large are not computed. The time for an irrational value is not
known in advance, so it should be computed in a process with a time limit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

from agentrl_envs.mathematics.kinds import INFINITY, PI, Call, E, Expression, I, Name, Number

BITS = 1 << 15  # of an intermediate numerator or denominator
PRECISION = 2_048  # bits of an irrational constant
SAMPLE_PRECISION = 512  # bits of an irrational value of an expression with variables
LARGEST_FACTORIAL = 3_000
LARGEST_LOGARITHM = 1 << 20  # bits before the point of a power
LARGEST_ARGUMENT = 64  # bits before the point of the argument of a sine


class Undefined(Exception):  # noqa: N818
    """The expression has no value, such as 1/0."""


class TooLargeError(Exception):
    """The value is out of bounds."""


class Irrational(Exception):  # noqa: N818
    """The value is not a fraction, or is not recognized as one."""


@dataclass(frozen=True, slots=True)
class Point:
    """A real or complex number.

    Attributes:
        real: The real part.
        imaginary: The imaginary part.
        bits: The precision in bits; 0 for an exact number.
    """

    real: Fraction
    imaginary: Fraction = Fraction(0)
    bits: int = 0

    def size(self) -> Fraction:
        """Return the larger absolute value of the two parts."""
        return max(abs(self.real), abs(self.imaginary))

    def __sub__(self, other: "Point") -> "Point":
        return Point(self.real - other.real, self.imaginary - other.imaginary, self._known(other))

    def __mul__(self, other: "Point") -> "Point":
        real = self.real * other.real - self.imaginary * other.imaginary
        imaginary = self.real * other.imaginary + self.imaginary * other.real
        return Point(real, imaginary, self._known(other))

    def _known(self, other: "Point") -> int:
        return min(self.bits or other.bits, other.bits or self.bits)

    def close(self, other: "Point") -> bool:
        """Return whether two numbers are equal; inexact ones in half of their bits, since some are lost."""
        bits = self._known(other)
        if not bits:
            return self == other
        return (self - other).size() <= max(self.size(), other.size()) / (1 << bits // 2)


def exact(expression: Expression, at: Mapping[str, Fraction] = {}, bits: int = BITS) -> Fraction:
    """Compute the value of a rational expression.

    Args:
        expression: The expression, of numbers, names in `at`, + - * /, powers, roots, factorials, binomials,
            |x| and rounding.
        at: The values of its variables.
        bits: The largest number of bits of an intermediate numerator or denominator.

    Raises:
        Irrational: The value is not rational, or the expression contains other functions.
        Undefined: The expression has no value.
        TooLargeError: An intermediate number is out of bounds.
    """
    match expression:
        case Number(value):
            return _bounded(value, bits)
        case Name(name) if name in at:
            return at[name]
        case Call(function, arguments) if function in _EXACT:
            values = [exact(argument, at, bits) for argument in arguments]
            return _bounded(_EXACT[function](values, bits), bits)
    raise Irrational


def _bounded(value: Fraction, bits: int) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > bits:
        raise TooLargeError
    return value


def _sum(values: Sequence[Fraction], bits: int) -> Fraction:
    return reduce(lambda left, right: _bounded(left + right, bits), values)


def _product(values: Sequence[Fraction], bits: int) -> Fraction:
    return reduce(lambda left, right: _bounded(left * right, bits), values)


def _inverse(values: Sequence[Fraction], bits: int) -> Fraction:
    if values[0] == 0:
        raise Undefined
    return 1 / values[0]


def _power(values: Sequence[Fraction], bits: int) -> Fraction:
    base, exponent = values
    if base == 0 and exponent <= 0:
        raise Undefined
    if base in (0, 1):
        return base
    if exponent.denominator > 1:
        base, exponent = _root([Fraction(exponent.denominator), base], bits), Fraction(exponent.numerator)
    size = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if abs(exponent) * max(size, 1) > bits and abs(base) != 1:
        raise TooLargeError
    return Fraction(base ** (exponent.numerator if abs(base) != 1 else exponent.numerator % 2))


def _root(values: Sequence[Fraction], bits: int) -> Fraction:
    degree, value = values
    if degree.denominator > 1 or not 1 < degree <= bits:
        raise Irrational
    odd = degree.numerator % 2 == 1
    if value < 0 and not odd:
        raise Irrational
    size = abs(value)
    top, bottom = (_whole_root(part, degree.numerator) for part in (size.numerator, size.denominator))
    return Fraction(top, bottom) * (-1 if value < 0 else 1)


def _whole_root(value: int, degree: int) -> int:
    """Return the root of a whole number if it is whole, too."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    if low**degree != value:
        raise Irrational
    return low


def _factorial(values: Sequence[Fraction], bits: int) -> Fraction:
    value = values[0]
    if value.denominator > 1:
        raise Irrational
    if value < 0:
        raise Undefined
    if value > LARGEST_FACTORIAL:
        raise TooLargeError
    return Fraction(math.factorial(value.numerator))


def _binomial(values: Sequence[Fraction], bits: int) -> Fraction:
    above, below = values
    if above.denominator > 1 or below.denominator > 1 or above < 0 or below < 0:
        raise Undefined
    if above > LARGEST_FACTORIAL:
        raise TooLargeError
    return Fraction(math.comb(above.numerator, below.numerator))


_EXACT: dict[str, Callable[[Sequence[Fraction], int], Fraction]] = {
    "+": _sum,
    "*": _product,
    "-": lambda values, bits: -values[0],
    "inverse": _inverse,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "binom": _binomial,
    "abs": lambda values, bits: abs(values[0]),
    "floor": lambda values, bits: Fraction(math.floor(values[0])),
    "ceil": lambda values, bits: Fraction(math.ceil(values[0])),
}


def infinite(expression: Expression) -> int:
    """Return 1 or -1 if an expression is infinity or its negative, else 0."""
    match expression:
        case Name(name) if name == INFINITY:
            return 1
        case Call("-", (inner,)):
            return -infinite(inner)
    return 0


def numeric(expression: Expression, at: Mapping[str, Fraction], logarithm: int, bits: int) -> Point:
    """Compute a real or complex value numerically.

    Args:
        expression: The expression.
        at: The values of its variables.
        logarithm: The base of "log" if none is written; 0 for e.
        bits: The working precision in bits; cancellation of terms loses some of them.

    Raises:
        Undefined: The expression has no value.
        TooLargeError: An intermediate number is out of bounds.
    """
    import mpmath  # type: ignore[import-untyped,unused-ignore]

    with mpmath.workprec(bits):
        try:
            value = mpmath.mpc(_Numeric(mpmath.mp, at, logarithm).value(expression))
        except (ValueError, ArithmeticError, TypeError) as error:
            raise Undefined from error
    return Point(_fraction(value.real), _fraction(value.imag), bits)


def _fraction(value: Any) -> Fraction:
    sign, mantissa, exponent, _ = value._mpf_
    if not mantissa and exponent:
        raise Undefined  # infinity or NaN
    if abs(exponent) > 2 * LARGEST_LOGARITHM:
        raise TooLargeError
    whole = -int(mantissa) if sign else int(mantissa)
    return Fraction(whole << exponent) if exponent >= 0 else Fraction(whole, 1 << -exponent)


class _Numeric:
    def __init__(self, mp: Any, at: Mapping[str, Fraction], logarithm: int) -> None:
        self._mp, self._at, self._logarithm = mp, at, logarithm

    def value(self, expression: Expression) -> Any:
        mp = self._mp
        match expression:
            case Number(value):
                return mp.mpf(value.numerator) / value.denominator
            case Name(name):
                return self._name(name)
            case Call("log", (argument, base)):
                return mp.log(self.value(argument)) / mp.log(self.value(base))
            case Call(function, arguments):
                values = [self.value(argument) for argument in arguments]
                if function in _METHODS:
                    return getattr(self, f"_{_METHODS[function]}")(*values)
                return self._applied(function, values)
        raise Undefined

    def _name(self, name: str) -> Any:
        constants = {PI: self._mp.pi, E: self._mp.e, I: self._mp.mpc(0, 1)}
        if name in constants:
            return +constants[name]
        if name not in self._at:
            raise Undefined
        value = self._at[name]
        return self._mp.mpf(value.numerator) / value.denominator

    def _plus(self, *values: Any) -> Any:
        return self._mp.fsum(values)

    def _times(self, *values: Any) -> Any:
        return self._mp.fprod(values)

    def _negative(self, value: Any) -> Any:
        return -value

    def _inverse(self, value: Any) -> Any:
        return 1 / value

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if exponent == 0 or self._mp.re(exponent) <= 0:
                raise Undefined
            return base
        if abs(exponent) * (abs(self._mp.mag(base)) + 1) > LARGEST_LOGARITHM:
            raise TooLargeError
        return base**exponent

    def _root(self, degree: Any, value: Any) -> Any:
        if degree == 0 or not self._mp.isint(degree):
            raise Undefined
        if self._mp.im(value) == 0 and self._mp.re(value) < 0 and int(self._mp.re(degree)) % 2:
            return -((-value) ** (1 / degree))
        return self._power(value, 1 / degree)

    def _factorial(self, value: Any) -> Any:
        if abs(value) > LARGEST_FACTORIAL:
            raise TooLargeError
        return self._mp.factorial(value)

    def _binomial(self, above: Any, below: Any) -> Any:
        if max(abs(above), abs(below)) > LARGEST_FACTORIAL:
            raise TooLargeError
        return self._mp.binomial(above, below)

    def _degree(self, value: Any) -> Any:
        return value * self._mp.pi / 180

    def _log(self, value: Any) -> Any:
        return self._mp.log(value) / (self._mp.log(self._logarithm) if self._logarithm else 1)

    def _applied(self, function: str, values: Sequence[Any]) -> Any:
        if function not in _FUNCTIONS:
            raise Undefined
        if function not in _ANY_SIZE and any(
            self._mp.mag(value) > LARGEST_ARGUMENT for value in values if value
        ):
            raise TooLargeError
        return getattr(self._mp, _FUNCTIONS[function])(*values)


_METHODS = {
    "+": "plus", "*": "times", "-": "negative", "inverse": "inverse", "^": "power", "root": "root",
    "!": "factorial", "binom": "binomial", "degree": "degree", "log": "log",
}  # fmt: skip
_FUNCTIONS = {
    name: name
    for name in [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "acot",
        "asec",
        "acsc",
        "sinh",
        "cosh",
        "tanh",
    ]
}
_FUNCTIONS |= {"asinh": "asinh", "acosh": "acosh", "atanh": "atanh", "ln": "log", "abs": "fabs"}
_FUNCTIONS |= {"floor": "floor", "ceil": "ceil"}
_ANY_SIZE = frozenset({"ln", "abs", "floor", "ceil"})
