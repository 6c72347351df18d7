"""Calculator for policies: exact fractions, bounded work, and arithmetic only.

>>> calculate("12 * (3 + 4) / 9")
'28/3'
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

MAX_LENGTH = 500  # characters of an expression
MAX_DEPTH = 50  # of nested operations
MAX_BITS = 4096  # of an intermediate numerator or denominator
MAX_DIGITS = 300  # of a result
LARGEST_FACTORIAL = 400

Value = Fraction | bool

_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
_GLUED = re.compile(r"""\d[A-Za-z_]|[^\x20-\x7e]|["'#\\]""")
_LONG_DECIMAL = re.compile(r"(?=[\d.]*\.)[\d.]{17,}")


class CalculatorError(ValueError):
    """The text is not an expression, or its value is out of bounds; policies read the message."""


def calculate(expression: str) -> str:
    """Evaluate an expression.

    Args:
        expression: Numbers with + - * / // % ** (or ^), comparisons, parentheses, and the functions abs,
            ceil, factorial, floor, gcd, lcm, max, min, round, sqrt (of squares).

    Returns:
        A whole number such as "84", a fraction in lowest terms such as "7/3", or "True" or "False".

    Raises:
        CalculatorError: The text is anything else, or the result is too long.
    """
    text = str(evaluate(parse(expression)))
    if len(text) > MAX_DIGITS:
        raise CalculatorError(f"the result has {len(text)} digits, at most {MAX_DIGITS} are shown")
    return text


def parse(expression: str) -> ast.expr:
    """Parse an expression; its operations are not checked before `evaluate`."""
    text = " ".join(expression.split()).translate(_SPELLINGS)
    if not text:
        raise CalculatorError("the expression is empty")
    if len(text) > MAX_LENGTH:
        raise CalculatorError(f"the expression has {len(text)} characters, at most {MAX_LENGTH} are read")
    glued = _GLUED.search(text)
    if glued is not None:  # Python would warn about "2or 3" and accept "0x10"
        raise CalculatorError(f"cannot read {glued[0]!r}; write products with *")
    if _LONG_DECIMAL.search(text):  # a float preserves 15 digits
        raise CalculatorError("a decimal has at most 15 digits")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError("not an expression") from None


def whole_numbers(node: ast.expr) -> Iterator[int]:
    """Yield the numbers in an expression of whole numbers, + - * / and parentheses.

    Raises:
        CalculatorError: The expression contains anything else.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield node.value
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        yield from whole_numbers(node.left)
        yield from whole_numbers(node.right)
    else:
        raise CalculatorError("only whole numbers with + - * / and parentheses are allowed")


def evaluate(node: ast.expr, depth: int = 0) -> Value:
    """Evaluate a parsed expression."""
    if depth > MAX_DEPTH:
        raise CalculatorError(f"more than {MAX_DEPTH} nested operations")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _literal(value)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign):
            number = _number(evaluate(node.operand, depth + 1))
            return -number if isinstance(sign, ast.USub) else number
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = (_number(evaluate(side, depth + 1)) for side in (node.left, node.right))
            return _bounded(_OPERATORS[type(node.op)](left, right))
        case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
            sides = [_number(evaluate(side, depth + 1)) for side in (node.left, *node.comparators)]
            return all(_COMPARISONS[type(op)](*sides[i : i + 2]) for i, op in enumerate(node.ops))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            arguments = [_number(evaluate(argument, depth + 1)) for argument in node.args]
            return _bounded(_call(name, arguments))
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name) if name not in _FUNCTIONS:
            raise CalculatorError(f"{name[:30]!r} is unknown; functions: {', '.join(_FUNCTIONS)}")
    raise CalculatorError("only numbers, + - * / // % **, comparisons, parentheses and functions are read")


def _literal(value: int | float) -> Fraction:
    # A decimal stands for its shortest spelling, not for the nearest binary number.
    return _bounded(Fraction(value) if isinstance(value, int) else Fraction(repr(value)))


def _number(value: Value) -> Fraction:
    if isinstance(value, bool):
        raise CalculatorError("a comparison is no number")
    return value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("the number is too large")
    return value


def _divide(left: Fraction, right: Fraction) -> Fraction:
    return left / _divisor(right)


def _floor_divide(left: Fraction, right: Fraction) -> Fraction:
    return Fraction(left // _divisor(right))


def _remainder(left: Fraction, right: Fraction) -> Fraction:
    return left % _divisor(right)


def _divisor(value: Fraction) -> Fraction:
    if value == 0:
        raise CalculatorError("division by zero")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculatorError("an exponent must be a whole number")
    if exponent < 0:
        _divisor(base)
    if abs(base) == 1 or base == 0:
        return Fraction(base ** (int(exponent) % 2)) if exponent else Fraction(1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (bits - 1) * abs(exponent) > MAX_BITS:
        raise CalculatorError("the number is too large")
    return Fraction(base ** int(exponent))


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: _floor_divide,
    ast.Mod: _remainder,
    ast.Pow: _power,
}

_COMPARISONS: dict[type[ast.cmpop], Callable[[Fraction, Fraction], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _whole(value: Fraction) -> int:
    if value.denominator != 1:
        raise CalculatorError(f"{str(value)[:30]} is not a whole number")
    return value.numerator


def _root(value: Fraction) -> Fraction:
    if value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root
    raise CalculatorError(f"sqrt({str(value)[:30]}) is not a fraction")


def _factorial(value: Fraction) -> Fraction:
    if not 0 <= _whole(value) <= LARGEST_FACTORIAL:
        raise CalculatorError(f"factorial is of 0 to {LARGEST_FACTORIAL}")
    return Fraction(math.factorial(int(value)))


def _lcm(*values: Fraction) -> Fraction:
    multiple = Fraction(1)
    for value in values:
        multiple = _bounded(Fraction(math.lcm(_whole(multiple), _whole(value))))
    return multiple


# Name -> function, minimum and maximum number of arguments.
_FUNCTIONS: dict[str, tuple[Callable[..., Fraction], int, int]] = {
    "abs": (abs, 1, 1),
    "ceil": (lambda x: Fraction(math.ceil(x)), 1, 1),
    "factorial": (_factorial, 1, 1),
    "floor": (lambda x: Fraction(math.floor(x)), 1, 1),
    "gcd": (lambda *xs: Fraction(math.gcd(*map(_whole, xs))), 1, 99),
    "lcm": (_lcm, 1, 99),
    "max": (max, 2, 99),
    "min": (min, 2, 99),
    "round": (lambda x: Fraction(round(x)), 1, 1),
    "sqrt": (_root, 1, 1),
}


def _call(name: str, arguments: list[Fraction]) -> Fraction:
    function, fewest, most = _FUNCTIONS[name]
    if not fewest <= len(arguments) <= most:
        raise CalculatorError(f"{name} was given {len(arguments)} numbers")
    return function(*arguments)
