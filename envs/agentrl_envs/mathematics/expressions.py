"""Parser of expressions: sums, products, powers, functions, and where units end them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

from agentrl_envs.mathematics.kinds import (
    INFINITY,
    PI,
    Answer,
    Call,
    E,
    Expression,
    I,
    Name,
    Number,
    Value,
    variables,
)
from agentrl_envs.mathematics.spelling import GREEK
from agentrl_envs.mathematics.tokens import FUNCTIONS, Token, Unreadable
from agentrl_envs.mathematics.units import LETTERS, known_unit

MAX_DEPTH = 40  # nested brackets, exponents and functions

END = Token("sign", "")
_ROUND = {"lfloor": "rfloor", "lceil": "rceil"}
_ACCENT_COMMANDS = "hat bar vec tilde dot ddot widehat overrightarrow"
ACCENTS = frozenset(_ACCENT_COMMANDS.split())
_CAPITALS = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell"
VARIABLES = frozenset(GREEK).union(_CAPITALS.split()) - {"pi"}
_APPLIED = FUNCTIONS - {"sqrt", "exp", "arcsin", "arccos", "arctan"}
_BEGINNING = _APPLIED | VARIABLES | ACCENTS | {"pi", "infty", "sqrt", "exp", "binom", *_ROUND}
_WITHIN_UNITS = frozenset(["a", "an", "of", "in", "at", "on"])
_ONE = Number(Fraction(1))


class ExpressionReader:
    """Recursive-descent parser over the tokens of an answer; it never backtracks, so all work is linear.

    Args:
        signs: The tokens of the answer.
        letters: Whether single letters after a number are units instead of variables.
    """

    def __init__(self, signs: Sequence[Token], letters: bool) -> None:
        self._signs, self._letters = list(signs), letters
        self._at = self._depth = self._bars = 0
        self._after_degrees = False

    def next(self, ahead: int = 0) -> Token:
        """Return a coming token without consuming it."""
        place = self._at + ahead
        return self._signs[place] if place < len(self._signs) else END

    def take(self) -> Token:
        """Consume and return the next token."""
        token = self.next()
        self._at += 1
        return token

    def sees(self, *texts: str, ahead: int = 0) -> bool:
        """Return whether a coming token is one of these signs or commands (letters do not count)."""
        token = self.next(ahead)
        return token.kind in ("sign", "command") and token.text in texts

    def accept(self, *texts: str) -> bool:
        """Consume the next token if it is one of these; return whether it was."""
        seen = self.sees(*texts)
        self._at += seen
        return seen

    def expect(self, *texts: str) -> None:
        """Consume the next token, which must be one of these."""
        if not self.accept(*texts):
            raise Unreadable(self.next().text)

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Enter a level of nesting, whose depth is limited."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nesting")
        bars, self._bars = self._bars, 0
        yield
        self._depth, self._bars = self._depth - 1, bars

    def bracket(self) -> Answer:
        """Parse what starts with a bracket."""
        raise NotImplementedError

    def sum(self, first: Expression | None = None) -> Expression:
        """Parse an expression, whose first factor may have been parsed already."""
        terms: list[Expression] = []
        sign = self.take().text if first is None and self.sees("+", "-", "pm", "mp") else "+"
        while True:
            term = self._product(first)
            first = None
            if sign in ("pm", "mp"):
                terms = [Call(sign, (_joined("+", terms), term))]
            else:
                terms.append(term if sign == "+" else Call("-", (term,)))
            if not self.sees("+", "-", "pm", "mp"):
                return _joined("+", terms)
            sign = self.take().text
            if sign == "+" and self.accept("-"):
                sign = "-"

    def _product(self, first: Expression | None = None) -> Expression:
        factors = [self._power(first)]
        numeric = not variables(factors[0])
        while True:
            if self.sees("/") and numeric and self._depth == 0 and self._unit_follows():
                break
            if self.accept("*", "cdot", "times"):
                factor = self._signed()
            elif self.accept("/", "div"):
                factor = Call("inverse", (self._signed(),))
            elif self._begins_factor(numeric):
                factor = self._power()
            else:
                break
            factors.append(factor)
            numeric = numeric and not variables(factor)
        return _joined("*", factors)

    def _signed(self) -> Expression:
        return Call("-", (self._power(),)) if self.accept("-") else self._power()

    def _begins_factor(self, numeric: bool) -> bool:
        """Return whether a product continues without a sign; `numeric` says that it has no variable yet."""
        token = self.next()
        if self._after_degrees and token.text in ("C", "F"):
            return False
        if token.kind == "letters":
            return not (numeric and self._depth == 0 and self.is_unit(token, False))
        if token.kind == "word":
            return token.text in (E, I)
        if self.sees("(", "{"):
            return self.next(1).kind != "word"
        if self.sees("|"):
            return not self._bars
        if self.sees("frac"):
            return self.next(2).kind != "word" or self.next(2).text in (E, I)
        return self.sees(*_BEGINNING)

    def _unit_follows(self) -> bool:
        token = self.next(1)
        return (token.kind == "word" and token.text not in (E, I)) or known_unit(token.text)

    def is_unit(self, token: Token, begun: bool) -> bool:
        """Return whether letters after a number are a unit instead of a product of variables.

        Args:
            token: The letters.
            begun: Whether other words of a unit precede them.
        """
        run = token.text
        likely = run in LETTERS or (
            len(run) == 3 and token.spaced and run.islower() and re.search("[aeiouy]", run)
        )
        if likely and (begun or self._letters):
            return True
        return (begun and run.lower() in _WITHIN_UNITS) or run in ("sq", "cu") or known_unit(run)

    def _power(self, first: Expression | None = None) -> Expression:
        base = self._primary() if first is None else first
        if self.accept("!"):
            base = Call("!", (base,))
            if self.sees("!"):
                raise Unreadable("!!")
        self._after_degrees = self.sees("circ") or (self.sees("^") and self._circle_follows())
        if self._after_degrees:
            return self._degrees(base)
        if self.accept("^"):
            base = Call("^", (base, self._exponent()))
            if self.sees("^", "!"):
                raise Unreadable(self.next().text)
        return base

    def _circle_follows(self) -> bool:
        return self.sees("circ", ahead=1) or (self.sees("{", ahead=1) and self.sees("circ", ahead=2))

    def _degrees(self, base: Expression) -> Expression:
        """Parse degrees, and the minutes and seconds after them."""
        self.accept("^")
        braces = self.accept("{")
        self.expect("circ")
        if braces:
            self.expect("}")
        parts = [base]
        for mark, share in (("'", 60), ("''", 3600)):
            if self.next().kind == "number" and self.sees(mark, ahead=1):
                parts.append(Call("*", (self._numeral(), Number(Fraction(1, share)))))
                self.take()
        return Call("degree", (_joined("+", parts),))

    def _exponent(self) -> Expression:
        with self.deeper():
            if self.sees("{"):
                return self._group()
            if self.accept("-"):
                return Call("-", (self._numeral() if self.next().kind == "number" else self._primary(),))
            return self._numeral() if self.next().kind == "number" else self._primary()

    def _group(self) -> Expression:
        self.expect("{")
        with self.deeper():
            found = self.sum()
        self.expect("}")
        return found

    def _argument(self) -> Expression:
        r"""Parse the argument of a command such as \frac: a group, or else the next digit or token alone."""
        token = self.next()
        if self.sees("{"):
            return self._group()
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            rest = token.text[1:]
            self._signs[self._at] = Token("number", rest, False, Number(Fraction(rest)))
            return Number(Fraction(token.text[0]))
        with self.deeper():
            return self._numeral() if token.kind == "number" else self._primary()

    def _numeral(self) -> Number:
        token = self.take()
        if token.number is None:
            raise Unreadable(token.text)
        return token.number

    def _primary(self) -> Expression:
        token = self.next()
        if token.kind == "number":
            return self._mixed()
        if token.kind == "letters":
            return self.variable()
        if token.kind == "word" and token.text in (E, I):
            return Name(self.take().text)
        if self.sees("(", "[", "{") and token.kind == "sign":
            found = self.bracket()
            if not isinstance(found, Value) or found.unit or found.percent:
                raise Unreadable(token.text)
            return found.expression
        if self.accept("|"):
            with self.deeper():
                self._bars = 1
                inner = self.sum()
            self.expect("|")
            return Call("abs", (inner,))
        if token.kind == "command":
            return self.command()
        raise Unreadable(token.text)

    def _mixed(self) -> Expression:
        """Parse a number, or a mixed one such as 3 1/2."""
        text, whole = self.next().text, self._numeral()
        if text.isdigit() and self.sees("frac") and self._begins_factor(True):
            part = self._primary()
            top, bottom = _plain_fraction(part)
            if bottom == 0:
                return Call("*", (whole, self._power(part)))
            if top >= bottom:
                raise Unreadable("frac")
            return Number(whole.value + Fraction(top, bottom))
        above, below = self.next(), self.next(2)
        if above.kind == "number" and above.spaced and self.sees("/", ahead=1) and below.kind == "number":
            if not (text + above.text + below.text).isdigit() or int(above.text) >= int(below.text):
                raise Unreadable("/")
            self._at += 3
            return Number(whole.value + Fraction(int(above.text), int(below.text)))
        return whole

    def variable(self) -> Name:
        """Parse one letter with its subscript and primes."""
        token = self.take()
        letter, rest = token.text[0], token.text[1:]
        if rest:
            self._at -= 1
            self._signs[self._at] = Token("letters", rest)
        return self._indexed(letter)

    def _indexed(self, letter: str) -> Name:
        name = letter
        if self.accept("_"):
            name += f"_{self._foot()}"
        while self.sees("'", "''"):
            name += self.take().text
        return Name(name)

    def _foot(self) -> str:
        if not self.accept("{"):
            return self.take().text
        told = ""
        while not self.accept("}"):
            if self.next() is END:
                raise Unreadable("{")
            told += self.take().text
        return told

    def command(self) -> Expression:
        """Parse a LaTeX command and its arguments."""
        command = self.take().text
        if command in VARIABLES:
            return self._indexed(f"\\{command}")
        with self.deeper():
            match command:
                case "pi":
                    return Name(PI)
                case "infty":
                    return Name(INFINITY)
                case "frac":
                    top = self._argument()
                    return Call("*", (top, Call("inverse", (self._argument(),))))
                case "binom":
                    return Call("binom", (self._argument(), self._argument()))
                case "sqrt":
                    return self._root()
                case "exp":
                    return Call("^", (Name(E), self._applied()))
                case "lfloor" | "lceil":
                    inner = self.sum()
                    self.expect(_ROUND[command])
                    return Call("floor" if command == "lfloor" else "ceil", (inner,))
            if command in ACCENTS:
                return self._accented(command)
            if command in _APPLIED:
                return self._function(command)
        raise Unreadable(command)

    def _accented(self, accent: str) -> Name:
        braces = self.accept("{")
        letter = self.take()
        if letter.kind != "letters" or len(letter.text) > 1:
            raise Unreadable(accent)
        if braces:
            self.expect("}")
        return self._indexed(f"\\{accent} {letter.text}")

    def _root(self) -> Expression:
        degree: Expression = Number(Fraction(2))
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
        if self.sees("("):
            return Call("root", (degree, self._primary()))
        if self.next().kind == "number":
            return Call("root", (degree, self._numeral()))
        return Call("root", (degree, self._argument()))

    def _function(self, name: str) -> Expression:
        base = self._argument() if name == "log" and self.accept("_") else None
        power = self._exponent() if self.accept("^") else None
        inverse = power == Call("-", (_ONE,)) and name not in ("log", "ln")
        argument = self._applied()
        called = Call(f"a{name}" if inverse else name, (argument,) if base is None else (argument, base))
        return called if power is None or inverse else Call("^", (called, power))

    def _applied(self) -> Expression:
        """Parse the argument of a function: a bracket, or the factors up to the next sign or function."""
        if self.sees("(", "{"):
            return self._primary()
        factors = [self._power()]
        while self._begins_factor(False) and not self.sees(*_APPLIED):
            factors.append(self._power())
        return _joined("*", factors)


def _joined(function: str, parts: Sequence[Expression]) -> Expression:
    """Build a sum or a product; a decimal times a power of ten becomes one decimal."""
    if not parts:
        return Number(Fraction(0))
    if len(parts) == 1:
        return parts[0]
    match function, parts:
        case "*", [Number(value, digits, step), Call("^", (Number(base), power))] if digits and base == 10:
            exponent = _whole(power)
            if exponent is not None and abs(exponent) < 1_000:
                scale = Fraction(10) ** exponent
                return Number(value * scale, digits, step * scale)
    return Call(function, tuple(parts))


def _whole(expression: Expression) -> int | None:
    match expression:
        case Number(value, 0) if value.denominator == 1:
            return value.numerator
        case Call("-", (Number(value, 0),)) if value.denominator == 1:
            return -value.numerator
    return None


def _plain_fraction(expression: Expression) -> tuple[int, int]:
    """Return numerator and denominator if they are plain whole numbers, else 0, 0."""
    match expression:
        case Call("*", (Number(top, 0), Call("inverse", (Number(bottom, 0),)))):
            if top.denominator == bottom.denominator == 1:
                return top.numerator, bottom.numerator
    return 0, 0
