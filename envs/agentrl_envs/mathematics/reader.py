"""Parser of answers: from tokens to one of the kinds; all of the answer must be understood."""

import re
from collections.abc import Sequence
from functools import lru_cache

from agentrl_envs.mathematics.expressions import ACCENTS, END, MAX_DEPTH, VARIABLES, ExpressionReader
from agentrl_envs.mathematics.kinds import (
    Answer,
    Based,
    Call,
    E,
    Expression,
    I,
    Items,
    Joined,
    Matrix,
    Name,
    Named,
    Ratio,
    Reals,
    Relation,
    Value,
    Words,
    variables,
)
from agentrl_envs.mathematics.literals import in_base, literal
from agentrl_envs.mathematics.plus_minus import both_signs
from agentrl_envs.mathematics.spelling import normalize_spelling
from agentrl_envs.mathematics.tokens import Token, Unreadable, tokens
from agentrl_envs.mathematics.units import names_a_thing, names_a_value, unit

CACHED_ANSWERS = 256  # a long answer takes 100 kB

_RELATIONS = ("=", "<", ">", "le", "ge", "ne", "in")
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",), "{": ("}",)}
_MATRICES = frozenset(["pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array"])
_FIGURES = frozenset(["angle", "triangle", "overline"])
# Letters that before parentheses name a function instead of a factor.
_CALLED = frozenset("fghpqrsuvFGHPQRSTAVECLN")
_HALF_OF_DAY = re.compile(r"(?<=\d )([AaPp])\.[Mm](?:\.|$)|(?<=\d )([AaPp])(?=[Mm])")


@lru_cache(maxsize=CACHED_ANSWERS)
def read(text: str, letters: bool = False) -> Answer | None:
    """Parse an answer.

    Args:
        text: The answer.
        letters: Whether single letters after a number are units, as in "5 m", instead of variables.

    Returns:
        The parsed answer; None if any part of it uses an unsupported notation.
    """
    text = normalize_spelling(text)
    try:
        return literal(text) or _Reader(tokens(text), letters).answer()
    except (Unreadable, RecursionError):
        return None


def words(text: str) -> str:
    """Return an answer as text for comparison, without markup and enclosing parentheses."""
    found = read(text)
    if isinstance(found, Words):
        return found.text
    try:
        signs = tokens(normalize_spelling(text))
    except Unreadable:
        return " ".join(text.split())
    while len(signs) > 2 and signs[0].text == "(" and signs[-1].text == ")":
        signs = signs[1:-1]
    return _spelled(signs)


def says_words(text: str) -> bool:
    """Return whether an answer contains words, so that the case of its letters is ignored."""
    try:
        return any(token.kind == "word" for token in tokens(normalize_spelling(text)))
    except Unreadable:
        return False


def _spelled(signs: Sequence[Token]) -> str:
    told, last = "", "sign"
    for token in signs:
        between = token.spaced and {last, token.kind} <= {"word", "letters", "number"}
        told += " " * between + "\\" * (token.kind == "command") + token.text
        last = token.kind
    return _HALF_OF_DAY.sub(r"\1m", told.strip(".\"'"))


class _Reader(ExpressionReader):
    _named = 0  # depth of a chain of names such as x = y = 3

    def answer(self) -> Answer:
        """Parse the entire answer."""
        found = self._items()
        if self.next() is not END:
            raise Unreadable(self.next().text)
        return found

    # Lists, names, relations

    def _items(self) -> Answer:
        """Parse the content of brackets, or of the entire answer."""
        found, joined = both_signs(self._item()), set()
        while self._separator():
            joined.add(self.take().text)
            while self.next().text in ("and", "or"):
                joined.add(self.take().text)
            found += both_signs(self._item())
        if {"and", "or"} <= joined:
            raise Unreadable("and, or")
        return Items("", tuple(found), "or" in joined) if len(found) > 1 else found[0]

    def _separator(self, ahead: int = 0) -> bool:
        return self.next(ahead).text in ("and", "or") or self.sees(",", ";", "\\", ahead=ahead)

    def _item(self) -> Answer:
        name = self._name()
        if name is not None:
            self._named += 1
            if self._named > MAX_DEPTH:
                raise Unreadable("=")
            return Named(name, self._item())
        self._named = 0
        sides, operators = [self._side()], []
        while self.sees(*_RELATIONS):
            operators.append(self.take().text)
            sides.append(self._side())
        return _relation(sides, operators)

    def _name(self) -> str | None:
        """Consume a name and its "=", as in x = 3, f(2) = 3, AB = 3, total cost = 3."""
        length, opened = 0, 0
        while self.next(length) is not END:
            opened += self.sees("(", "{", ahead=length) - self.sees(")", "}", ahead=length)
            if opened < 0 or (
                opened == 0 and (self._separator(length) or self.sees(*_RELATIONS, ahead=length))
            ):
                break
            length += 1
        if not self.sees("=", "in", ahead=length):
            return None
        name = _name([self.next(ahead) for ahead in range(length)])
        if name is not None:
            self._at += length + 1
        return name

    def _side(self) -> Answer:
        parts, operators = [self._part()], set()
        while not isinstance(parts[0], Value | Words):
            if self.accept("cup") or (self.next().text == "U" and self.take()):
                operators.add("cup")
            elif self.accept("setminus") or (isinstance(parts[0], Reals) and self.accept("-")):
                operators.add("setminus")
            else:
                break
            parts.append(self._part())
        if len(operators) > 1:
            raise Unreadable("cup, setminus")
        return Joined(tuple(parts), "setminus" in operators) if operators else parts[0]

    def _part(self) -> Answer:
        token = self.next()
        if token.kind == "word" and token.text not in (E, I):
            return self._words()
        if token.kind == "number" and self.sees("_", ahead=1):
            return self._digits()
        if self.accept("reals"):
            return Reals()
        if self.accept("emptyset"):
            return Items("{}", ())
        if token.kind == "command" and token.text == "{":
            return self._set()
        if token.kind == "command" and token.text.startswith("begin "):
            return self._matrix()
        first = None
        if self.sees(*_CLOSING):
            found = self.bracket()
            if not isinstance(found, Value) or found.unit or found.percent:
                return found
            first = found.expression
        value = self._value(first)
        return self._ratio(value) if self.sees(":") else value

    def _ratio(self, first: Value) -> Ratio:
        parts = [first]
        while self.accept(":"):
            parts.append(self._value(None))
        if any(part.unit or part.percent for part in parts):
            raise Unreadable(":")
        return Ratio(tuple(part.expression for part in parts))

    def _words(self) -> Words:
        begin = self._at
        while self.next().kind in ("word", "letters") and self.next().text not in ("and", "or"):
            self.take()
        if self._at == begin:
            raise Unreadable(self.next().text)
        return Words(_spelled(self._signs[begin : self._at]).casefold())

    def _digits(self) -> Based:
        """Parse digits and their base, such as 1011_2."""
        digits = self.take().text
        self.expect("_")
        braces = self.accept("{")
        base = self.take().text
        if braces:
            self.expect("}")
        return in_base(digits, base)

    # Brackets

    def bracket(self) -> Answer:
        """Parse a bracket: a list, set, tuple or interval, or a value in parentheses."""
        opening = self.take().text
        with self.deeper():
            inner = self._items()
        closing = self.next().text
        self.expect(*_CLOSING[opening])
        if opening == "{":
            return inner
        brackets = "()" if opening == "langle" else opening + closing
        if isinstance(inner, Items) and not inner.brackets and not inner.either:
            if len(inner.items) > 2 and brackets in ("(]", "[)"):
                raise Unreadable(brackets)
            return Items(brackets, inner.items)
        if isinstance(inner, Matrix) or (
            opening == "(" and closing == ")" and isinstance(inner, Value | Words)
        ):
            return inner
        if brackets == "[]" and isinstance(inner, Value):
            ends = self.next() is END or self._separator() or self.sees(")", "]", "}")
            return Items(brackets, (inner,)) if ends else inner
        raise Unreadable(brackets)

    def _set(self) -> Answer:
        self.take()
        if self.accept("}"):
            return Items("{}", ())
        with self.deeper():
            found = self._such_that() or self._items()
            if not isinstance(found, Relation):
                listed = isinstance(found, Items) and not found.brackets
                found = Items("{}", found.items if listed and isinstance(found, Items) else (found,))
        self.expect("}")
        return found

    def _such_that(self) -> Answer | None:
        """Parse the condition after the bar of {x | x > 3}, None if there is no bar."""
        length = 3 if self.sees("in", ahead=1) and self.sees("reals", ahead=2) else 1
        name = self.next().text
        if self.next().kind != "letters" or len(name) > 1 or not self.sees("|", ":", ahead=length):
            return None
        self._at += length + 1
        found = self._items()
        sides = found.sides if isinstance(found, Relation) else ()
        if variables(*(side.expression for side in sides if isinstance(side, Value))) != [name]:
            raise Unreadable("|")
        return found

    def _matrix(self) -> Matrix:
        environment = self.take().text.removeprefix("begin ")
        end = f"end {environment}"
        if environment not in _MATRICES:
            raise Unreadable(environment)
        rows: list[list[Expression]] = [[]]
        with self.deeper():
            while not self.accept(end):
                rows[-1].append(self.sum())
                if self.accept("\\"):
                    rows.append([])
                elif not self.sees(end):
                    self.expect("&")
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) > 1:
            raise Unreadable(environment)
        return Matrix(tuple(map(tuple, rows)))

    # Values and their units

    def _value(self, first: Expression | None) -> Value:
        negative = first is None and self.next(1).kind == "currency" and self.accept("-")
        currency = self.take().text if first is None and self.next().kind == "currency" else ""
        expression = self.sum(first)
        if negative:
            expression = Call("-", (expression,))
        if self._percent():
            of = self._unit(True)
            if of and unit(of) is None:
                raise Unreadable(of[0])
            return Value(expression, percent=True)
        pieces = [currency] if currency else []
        angle = _degrees(expression)
        if angle and not pieces:
            expression, pieces = angle, [self._scale()]
        more = self._unit(bool(pieces))
        if pieces and more and unit(more[:1]) == unit(pieces):
            more = more[1:]  # $5 dollars
        pieces += more
        if self.next().kind == "currency" and not pieces:
            pieces.append(self.take().text)
        found = unit(pieces) if pieces else None
        if pieces and found is None:
            raise Unreadable(" ".join(pieces))
        return Value(expression, found)

    def _percent(self) -> bool:
        token = self.next()
        word = token.text.lower() if token.kind == "word" else ""
        if word == "per" and self.next(1).text.lower() == "cent":
            self.take()
        elif not self.sees("%") and word != "percent":
            return False
        self.take()
        return True

    def _scale(self) -> str:
        """Parse the C or F after a degree sign; return the name of the unit."""
        scale = self.next().text
        if self.next().kind not in ("letters", "word") or scale not in ("C", "F"):
            return "degree"
        self.take()
        return "celsius" if scale == "C" else "fahrenheit"

    def _unit(self, begun: bool) -> list[str]:
        """Collect the words after a number for `units.unit`; `begun` says that a unit has started before."""
        pieces: list[str] = []
        while True:
            token, wordlike = self.next(), self.next(1).kind in ("word", "letters")
            joined = begun or bool(pieces)
            if token.kind == "word":
                thing = self.next(1).kind == "word" and names_a_thing(self.next(1).text)
                if token.text.lower() == "or" or (token.text.lower() == "and" and not thing):
                    return pieces
                pieces.append(self.take().text)
            elif token.kind == "letters" and self.is_unit(token, joined):
                pieces.append(self.take().text)
            elif wordlike and (self.sees("/") or (joined and self.sees("*", "cdot", "times", "-"))):
                pieces.append("/" if self.take().text == "/" else "*")
            elif pieces and self.accept("^"):
                pieces.append(f"^{self._whole_power()}")
            elif self.sees("(") and self.next(1).kind == "word":
                self.take()
                pieces += self._worded()
                self.expect(")")
            elif self.sees("frac") and self.sees("{", ahead=1) and self.next(2).kind == "word":
                self.take()
                self.expect("{")
                pieces += self._worded()
                self.expect("}")
                self.expect("{")
                pieces += ["/", *self._worded()]
                self.expect("}")
            else:
                return pieces

    def _worded(self) -> list[str]:
        found = []
        while self.next().kind == "word":
            found.append(self.take().text)
        return found

    def _whole_power(self) -> int:
        braces, negative = self.accept("{"), self.accept("-")
        text = self.take().text
        if not re.fullmatch(r"\d", text):
            raise Unreadable(text)
        if braces:
            self.expect("}")
        return -int(text) if negative else int(text)


def _degrees(expression: Expression) -> Expression | None:
    """Return the number of degrees of an angle, None if an expression is not an angle in degrees."""
    match expression:
        case Call("degree", (inner,)):
            return inner
        case Call("-", (Call("degree", (inner,)),)):
            return Call("-", (inner,))
    return None


def _relation(sides: list[Answer], operators: list[str]) -> Answer:
    if not operators:
        return sides[0]
    match sides, operators:
        case [Value(left), Value(Name(name) as right)], ["="] if not variables(left) and variables(right):
            return Named(name, sides[0])
        case [Items("()", names), Items("()") as values], ["="]:
            told = [_variable(name) for name in names]
            if all(told) and len(told) == len(values.items):
                return Named(",".join(told), values)
    if "in" in operators:
        raise Unreadable("in")
    return Relation(tuple(sides), tuple(operators))


def _variable(answer: Answer) -> str:
    """Return the name of an answer that is a single variable, else ""."""
    match answer:
        case Value(Name(name) as expression, None, False) if variables(expression):
            return name
    return ""


def _name(signs: Sequence[Token]) -> str | None:
    """Return the name formed by the tokens before "=", None if they are an expression."""
    texts = [token.text for token in signs]
    if not texts:
        return None
    if all(token.kind == "word" for token in signs):
        return " ".join(texts).lower() if names_a_value(texts) else None
    if texts[0] == "m" and len(texts) > 1 and texts[1] == "angle":
        signs, texts = signs[1:], texts[1:]
    if texts[0] in _FIGURES:
        plain = all(token.kind in ("letters", "word") or token.text in ("{", "}") for token in signs[1:])
        return "".join(text for text in texts if text not in ("{", "}")) if plain and len(texts) > 1 else None
    if len(signs) == 1 and signs[0].kind == "letters" and len(texts[0]) > 1:
        return texts[0] if texts[0].isupper() else None
    if signs[0].kind != "letters" and not (signs[0].kind == "command" and texts[0] in VARIABLES | ACCENTS):
        return None
    reader = _Reader(signs, False)
    try:
        name = reader.variable() if signs[0].kind == "letters" else reader.command()
    except Unreadable:
        return None
    rest = texts[reader._at :]
    if not isinstance(name, Name):
        return None
    called = len(rest) > 2 and rest[0] == "(" and rest[-1] == ")" and name.name[0] in _CALLED
    return name.name + "".join(rest) if not rest or (called and rest.count("(") == 1) else None
