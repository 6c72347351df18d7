r"""Judge replies to mathematical problems: extract the answer, and compare it with the correct one.

`mathematics` parses and compares both. Comparisons that need irrational or large numbers run in a separate
process with limits, where sums, integrals and limits are handled by math-verify (extra `math`).
"""

import importlib.util
import re
from fractions import Fraction
from functools import lru_cache

from agentrl.errors import ConfigError, missing_extra
from agentrl_envs import limited_calls
from agentrl_envs.math_judge import has_calculus
from agentrl_envs.mathematics.equality import NeedsTimeError, same

LONGEST_ANSWER = 2_000  # characters
ROUNDED_DIGITS = 6  # the default of `rounded_digits`
MOST_DIGITS = 100
CACHED_VERDICTS = 4_096

_BOX = r"\\f?box(?:ed)?(?![A-Za-z])"
_BRACES = re.compile(
    rf"(?P<box>{_BOX}\s*\{{)|{_BOX}\s*(?P<bare>[^\s{{}}$\\]+)|\\.|(?P<open>\{{)|(?P<close>\}})", re.DOTALL
)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?")
_LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
# A sentence that only states its answer.
_SENTENCE = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally|then),?\s+)?(?:the\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:it|answer|result|value|solution)\s*(?:is|equals|:)\s*:?\s*(?P<answer>\S.*)",
    re.IGNORECASE,
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{…} or \fbox{…}, None if there is none.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> last_boxed(r"so $\boxed 4$.")
    '4'
    """
    opened: list[int | None] = []  # per open brace: start of its content if it is a box, else None
    start, end = -1, -1
    for found in _BRACES.finditer(text):
        if found["box"] or found["open"]:
            opened.append(found.end() if found["box"] else None)
        elif found["bare"]:
            start, end = found.span("bare")
        elif found["close"] and opened:
            begin = opened.pop()
            if begin is not None and begin > start:
                start, end = begin, found.start()
    return text[start:end].strip() if end >= 0 else None


def last_tagged(text: str) -> str | None:
    """Return the content of the last complete <answer>…</answer>, None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def extract_answer(reply: str) -> str:
    r"""Return the answer in a reply: its last \boxed{…}, else its last <answer>…</answer>, else all of it.

    >>> extract_answer("2 + 2 is <answer>4</answer>.")
    '4'
    """
    for given in (last_boxed(reply), last_tagged(reply)):
        if given is not None:
            return given
    return reply.strip()


def number(text: str) -> Fraction | None:
    r"""Parse a number such as 42, -1,234.50, 7/3, \frac{7}{3} or $42$; return None for any other text."""
    if len(text) > LONGEST_ANSWER:
        return None
    text = text.replace("\\$", "$").replace("−", "-").strip().removesuffix(".").strip(" $\n\t")
    fraction = _LATEX_FRACTION.fullmatch(text)
    sign, top, bottom = fraction.groups() if fraction else ("", *_ratio(text))
    above, below = _decimal(top), _decimal(bottom)
    if above is None or not below:
        return None
    return (-above if sign == "-" else above) / below


def _ratio(text: str) -> tuple[str, str]:
    top, slash, bottom = text.partition("/")
    return top, bottom if slash else "1"


def _decimal(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text.strip())
    sign, whole, decimals = found.groups() if found and text.isascii() else ("", None, None)
    if not whole and not decimals:
        return None
    return Fraction(f"{sign}{(whole or '0').replace(',', '')}{decimals or ''}")


def same_number(gold: str, answer: str, rounded_digits: int | None = ROUNDED_DIGITS) -> bool:
    """Return whether an answer is the number `gold`; "x = 42", "42 apples" and "42%" are 42.

    >>> same_number("1/2", "0.5"), same_number("42", "42 or 43"), same_number("3", "3 million")
    (True, False, False)

    Raises:
        JudgeError: The answer could not be judged.
    """
    return _same(gold.strip(), answer.strip(), rounded_digits, False)


def same_mathematics(gold: str, reply: str, rounded_digits: int | None = ROUNDED_DIGITS) -> bool:
    r"""Return whether the answer in a reply is mathematically equal to `gold`.

    Without a box or a tag, the answer is the entire reply, or else what its last sentence states: "It is
    $\frac{1}{2}$." An answer that exceeds the limits of the judge is not equal.

    Raises:
        JudgeError: The answer could not be judged.
        MissingDependencyError: The extra `math` is needed and not installed.
    """
    boxed, tagged = last_boxed(reply), last_tagged(reply)
    gold = gold.strip()
    given = boxed if boxed is not None else tagged
    if given is not None:
        return _same(gold, given.strip(), rounded_digits, True)
    if _same(gold, reply.strip(), rounded_digits, True):
        return True
    sentence = re.split(r"(?<=[.!?])\s+|\n", reply[-LONGEST_ANSWER:].strip())[-1]
    found = _SENTENCE.fullmatch(sentence)
    return found is not None and _same(gold, found["answer"], rounded_digits, True)


def checked_digits(rounded_digits: object) -> int | None:
    """Return an environment's `rounded_digits` if it is valid.

    Raises:
        ConfigError: It is neither a number of digits nor None.
    """
    if rounded_digits is None or (type(rounded_digits) is int and 1 <= rounded_digits <= MOST_DIGITS):
        return rounded_digits
    raise ConfigError(
        f"rounded_digits: {rounded_digits!r}, wanted a whole number from 1 to {MOST_DIGITS}, or None"
    )


def judged_by(rounded_digits: int | None) -> dict[str, int | None]:
    """Return the judging settings that a task's hash includes: none if they are the defaults."""
    return {} if rounded_digits == ROUNDED_DIGITS else {"rounded_digits": rounded_digits}


def require_math_verify() -> None:
    """Raise `MissingDependencyError` if the extra `math` is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise missing_extra("answers that are not plain numbers need math-verify", "math")


def _same(gold: str, answer: str, rounded_digits: int | None, mathematics: bool) -> bool:
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    if gold == answer:
        return True
    try:
        if same(gold, answer, rounded_digits, quick=True):
            return True
        if not (mathematics and has_calculus(gold, answer)):
            return False
    except NeedsTimeError:
        pass
    if mathematics:
        require_math_verify()
    return _judged(gold, answer, rounded_digits, mathematics)


@lru_cache(maxsize=CACHED_VERDICTS)
def _judged(gold: str, answer: str, rounded_digits: int | None, mathematics: bool) -> bool:
    try:
        return bool(
            limited_calls.calls.call(
                "agentrl_envs.math_judge", "judge", gold, answer, rounded_digits, mathematics
            )
        )
    except limited_calls.OverLimitError:
        return False
