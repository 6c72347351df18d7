"""Whether a reply answers a problem: which part of it is the answer, and whether that equals the right one.

Numbers are compared here, exactly. Everything else is math-verify's to judge (extra `math`), in a process of
its own: it can be made to compute towers of powers, and bounds itself only by signals, which fail in threads.
"""

import importlib.util
import re
from fractions import Fraction
from functools import lru_cache

from agentrl.errors import missing_extra
from agentrl_envs import bounded

LONGEST_ANSWER = 2_000  # characters

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?")
_LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_VARIABLE = re.compile(r"\s*[A-Za-z]\s*=")
_UNIT = re.compile(r"(?:\\?%|°|\\text\{[^{}\d]*\}|(?:\s+[^\W\d_]+)+)$")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{…}; None where there is none.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # where the content of each open brace begins, if it is a box
    start, end = -1, -1
    for found in _BRACES.finditer(text):
        if found["box"] or found["open"]:
            opened.append(found.end() if found["box"] else None)
        elif found["close"] and opened:
            begin = opened.pop()
            if begin is not None and begin > start:
                start, end = begin, found.start()
    return text[start:end].strip() if end >= 0 else None


def last_tagged(text: str) -> str | None:
    """The content of the last complete <answer>…</answer>; None where there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def extract_answer(reply: str) -> str:
    r"""What a reply answers: its last \boxed{…}, else its last <answer>…</answer>, else all of it.

    >>> extract_answer("2 + 2 is <answer>4</answer>.")
    '4'
    """
    for given in (last_boxed(reply), last_tagged(reply)):
        if given is not None:
            return given
    return reply.strip()


def number(text: str) -> Fraction | None:
    r"""The number that a text is, such as 42, -1,234.50, 7/3, \frac{7}{3} or $42$; None where it is none."""
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


def same_number(gold: str, answer: str) -> bool:
    """Whether an answer is the number `gold`; "x = 42", "42 apples" and "42%" are 42.

    >>> same_number("1/2", "0.5"), same_number("42", "42 or 43")
    (True, False)
    """
    said = answer.strip().removesuffix(".").strip(" $\n\t")
    if len(said) > LONGEST_ANSWER:
        return False
    found = number(_UNIT.sub("", _VARIABLE.sub("", said, count=1)))
    return found is not None and found == number(gold)


def same_mathematics(gold: str, reply: str) -> bool:
    """Whether the answer in a reply means the same as `gold`, by math-verify where it is not plain.

    An answer that is too much to be judged is not equal.

    Raises:
        JudgeError: nothing could be found out about the answer.
        MissingDependencyError: the extra `math` is not installed.
    """
    boxed, tagged = last_boxed(reply), last_tagged(reply)
    given = boxed if boxed is not None else tagged
    # Of prose math-verify takes the last expression; a given answer is one as a whole.
    gold, answer = gold.strip(), (reply[-LONGEST_ANSWER:] if given is None else given).strip()
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    if gold == answer:
        return True
    left, right = number(gold), number(answer)
    if left is not None and right is not None:
        if left == right:
            return True
        if left.denominator == right.denominator == 1:
            return False
    return _judged(gold, answer, given is None)


def require_math_verify() -> None:
    """Raise `MissingDependencyError` where the extra `math` is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise missing_extra("answers that are not plain numbers need math-verify", "math")


@lru_cache(maxsize=65_536)
def _judged(gold: str, answer: str, prose: bool) -> bool:
    require_math_verify()
    try:
        return bool(bounded.calls.call("agentrl_envs.math_judge", "judge", gold, answer, prose))
    except bounded.OverLimitError:
        return False
