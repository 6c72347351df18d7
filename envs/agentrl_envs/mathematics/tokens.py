r"""Tokenizer of answers.

Markup that affects only the appearance is dropped: $…$, \left, \mathbf, \displaystyle, spaces. Thousands
separators become part of their number: 1,234 and 1{,}234 and 1\,234 and 1 234; within brackets a comma is a
separator of items.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from agentrl_envs.mathematics.kinds import Number
from agentrl_envs.mathematics.spelling import GREEK, GROUPING

LARGEST_EXPONENT = 2_000  # of a numeral such as 1e5

# Pairs of a command's spelling and its canonical name.
_SAME = """
dfrac frac  tfrac frac  cfrac frac  dbinom binom  tbinom binom  leq le  leqslant le  geq ge
geqslant ge  neq ne  lt <  gt >  varnothing emptyset  ast *  lbrace {  rbrace }  lvert |  rvert |
vert |  mid |  lbrack [  rbrack ]  colon :  backslash setminus  smallsetminus setminus  degree circ
arcsin asin  arccos acos  arctan atan  varphi phi  varepsilon epsilon  lor or  vee or  land and
wedge and
"""
_SAME_COMMAND = dict(zip(_SAME.split()[::2], _SAME.split()[1::2], strict=True))
_SAME_SIGN = {"<=": "le", ">=": "ge", "!=": "ne", "==": "=", "+/-": "pm"}
_LONG_SIGNS = (*_SAME_SIGN, "->", "''", "...")
_CURRENCIES = {
    "€": "euro",
    "£": "pound",
    "¥": "yen",
    "₹": "rupee",
    "pounds": "pound",
    "euro": "euro",
    "$": "dollar",
}

_LOOKS = """
left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits nolimits quad qquad
hspace hfill space thinspace bf rm it mathstrut strut , ; : > !
"""
_DROPPED = frozenset(_LOOKS.split())
_TEXTS = "text textrm textbf textit textsf texttt textup textnormal mbox mathrm operatorname emph"
_UPRIGHT = frozenset(_TEXTS.split())
_STYLES = "mathbf mathit mathsf boldsymbol bm pmb underline mathnormal boxed fbox"
_STYLED = frozenset(_STYLES.split())

# Words that mean the command of the same name even without a backslash.
_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh log ln exp sqrt arcsin arccos arctan"
FUNCTIONS = frozenset(_FUNCTIONS.split())
_CONSTANTS = {"pi": "pi", "infinity": "infty", "inf": "infty", "oo": "infty", "infty": "infty"}
# Short words that are never products of variables.
_WORDS = "or and per not no yes is mod the but nor am pm all one two six ten odd"
_SHORT_WORDS = frozenset(_WORDS.split())

_SPACE = r"(?:\\[,;:\x20>]|~|\x20)"
_NUMERAL = re.compile(
    rf"""
    (?: (?P<marked>[1-9]\d{{0,2}}(?:{GROUPING}\d{{3}})+) (?!\d)
      | (?P<commas>[1-9]\d{{0,2}}(?:,\d{{3}})+) (?!,?\d)
      | (?P<spaces>[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+) (?!{_SPACE}?\d|{_SPACE}*/)
      | (?P<digits>\d+)
    )?
    (?: \.(?P<before>\d*)\\(?:overline|bar|dot)\s*\{{?(?P<repeated>\d+)\}}? | \.(?P<decimals>\d+) )?
    (?: [eE](?P<exponent>[+-]?\d{{1,9}})(?![\w.]) )?
    """,
    re.VERBOSE | re.ASCII,
)
_DIGITS = re.compile(r"(?P<digits>\d+)", re.ASCII)
_NUMERAL_BEGINS = re.compile(r"\d|\.\d|\.\\(?:overline|bar|dot)(?![A-Za-z])", re.ASCII)
_TIGHT_COMMA = re.compile(r"\d,$", re.ASCII)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_ENVIRONMENT = re.compile(r"\s*\{([a-zA-Z]+)\*?\}(?:\{[clr| ]*\})?")
_REALS = re.compile(r"\s*(?:\{R\}|R)")
_EQUALS = re.compile(r"\s*=")


@dataclass(frozen=True, slots=True)
class Token:
    """A token.

    Attributes:
        kind: "number", "letters" (a run of letters), "word" (letters that are text), "command" (of LaTeX),
            "currency", or "sign".
        text: The spelling; of commands without the backslash.
        spaced: Whether white space precedes it.
        number: The value of a numeral.
    """

    kind: str
    text: str
    spaced: bool = False
    number: Number | None = None


class Unreadable(Exception):  # noqa: N818
    """The answer uses a notation that is not supported."""


def tokens(text: str) -> list[Token]:
    """Split a normalized text into tokens.

    Raises:
        Unreadable: The text contains an unsupported notation.
    """
    if text.startswith("~"):  # means "about" here, but a space elsewhere
        raise Unreadable("~")
    # A dollar sign is a currency if it is escaped or the only one, else the delimiter of a formula.
    if text.replace("\\$", "").count("$") == 1:
        text = text.replace("\\$", "$").replace("$", "\\$")
    return _Scanner(text.replace("**", "^")).scan()


class _Scanner:
    def __init__(self, text: str, upright: bool = False) -> None:
        self._text, self._at, self._upright = text, 0, upright
        self._found: list[Token] = []
        self._open = 0  # open brackets, within which a comma separates items
        self._spaced = False

    def scan(self) -> list[Token]:
        """Return the tokens of the text."""
        while self._at < len(self._text):
            self._next()
        return self._found

    def _add(self, kind: str, text: str, number: Number | None = None) -> None:
        self._found.append(Token(kind, text, self._spaced, number))
        self._spaced = False

    def _next(self) -> None:
        sign = self._text[self._at]
        if sign in " ~$":
            self._at += 1
            self._spaced |= sign != "$"
        elif _NUMERAL_BEGINS.match(self._text, self._at):
            self._numeral()
        elif sign == "\\":
            self._command()
        elif sign.isalpha():
            self._letters()
        elif sign in _CURRENCIES:
            self._at += 1
            self._add("currency", _CURRENCIES[sign])
        else:
            sign = next((long for long in _LONG_SIGNS if self._text.startswith(long, self._at)), sign)
            self._at += len(sign)
            self._open += (sign in "([") - (sign in ")]")
            self._add("sign", _SAME_SIGN.get(sign, sign))

    def _numeral(self) -> None:
        found = _NUMERAL.match(self._text, self._at)
        if found and found["commas"] and (self._open or _TIGHT_COMMA.search(self._text[: self._at][-2:])):
            found = _DIGITS.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        self._add("number", found[0], _number(found.groupdict()))

    def _command(self) -> None:
        found = _COMMAND.match(self._text, self._at)
        if found is None:
            raise Unreadable("\\")
        name = found[1]
        self._at = found.end()
        if name in ("left", "right") and self._text.startswith(".", self._at):
            self._at += 1
        elif name in _DROPPED or name.isspace():
            self._spaced = True
        elif name in _UPRIGHT or name in _STYLED:
            self._styled(name in _UPRIGHT)
        elif name in ("begin", "end"):
            self._add("command", f"{name} {self._passed(_ENVIRONMENT)[1]}")
        elif name == "mathbb":
            self._passed(_REALS)
            self._add("command", "reals")
        elif name == "not":
            self._passed(_EQUALS)
            self._add("command", "ne")
        elif name in _CURRENCIES:
            self._add("currency", _CURRENCIES[name])
        elif name == "%":
            self._add("sign", "%")
        else:
            name = _SAME_COMMAND.get(name, name)
            self._open += (name in ("{", "langle")) - (name in ("}", "rangle"))
            self._add("sign" if name in "<>*|[]:" else "command", name)

    def _passed(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise Unreadable(self._text[self._at : self._at + 9])
        self._at = found.end()
        return found

    def _styled(self, upright: bool) -> None:
        r"""Scan the text in the braces after \text, \mathbf and similar commands."""
        while self._text.startswith(" ", self._at):
            self._at += 1
        if not self._text.startswith("{", self._at):
            return
        depth, end = 0, self._at
        while end < len(self._text):
            sign = self._text[end]
            depth += (sign == "{") - (sign == "}")
            if depth == 0:
                break
            end += 2 if sign == "\\" else 1
        if depth:
            raise Unreadable("{")
        inner = _Scanner(self._text[self._at + 1 : end], upright or self._upright)
        inner._spaced, inner._open = self._spaced, self._open
        self._found += inner.scan()
        self._spaced, self._at = inner._spaced, end + 1

    def _letters(self) -> None:
        run = self._passed(_WORD)[0]
        if "'" in run and not self._upright:  # f'(x)
            self._at -= len(run) - run.index("'")
            run = run.partition("'")[0]
        known = run.lower()
        if run.islower() and (run in FUNCTIONS or (run in GREEK and run != "pi" and not self._upright)):
            self._add("command", _SAME_COMMAND.get(run, run))
        elif known in _CONSTANTS and (not self._upright or len(run) > 3):
            self._add("command", _CONSTANTS[known])
        elif self._upright or not run.isascii() or len(run) > 3 or known in _SHORT_WORDS:
            self._add("word", run)
        else:
            self._add("letters", run)


def _number(groups: dict[str, str | None]) -> Number | None:
    """Return the number for the groups of `_NUMERAL`, None if its exponent is too large."""
    whole = next(
        (groups[name] or "" for name in ("marked", "commas", "spaces", "digits") if groups.get(name)), ""
    )
    whole = "".join(sign for sign in whole if sign.isdigit())
    repeated, exponent = groups.get("repeated"), int(groups.get("exponent") or 0)
    decimals = groups.get("before" if repeated else "decimals") or ""
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    scale = Fraction(10) ** exponent
    value, place = Fraction(int(whole + decimals or "0"), 10 ** len(decimals)), scale / 10 ** len(decimals)
    if repeated:
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
    if repeated or not decimals:
        return Number(value * scale)
    return Number(value * scale, max(len((whole + decimals).lstrip("0")), 1), place)
