"""Answers that are one literal: digits in another base, a time of day, a date."""

import re

from agentrl_envs.mathematics.kinds import Based, Words
from agentrl_envs.mathematics.tokens import Unreadable

_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}
_ALPHANUMERIC = re.compile(
    r"(?:\\(?:text|mathrm)\{)?(?P<digits>[0-9A-F]{2,})\}?_\{?(?P<base>\d\d)\}?|0x(?P<hexadecimal>[0-9A-Fa-f]+)"
)
_CLOCK = re.compile(
    r"(\d{1,2}):([0-5]\d)(:[0-5]\d)?(?:[ ~]*(?:\\ )?(?:\\text\{ *)?([ap])\.?m\.?\}?)?", re.IGNORECASE
)
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?[/.-]\d\d?[/.-]\d{4}")


def literal(text: str) -> Based | Words | None:
    """Parse a normalized text that is such a literal; return None for any other.

    Raises:
        Unreadable: The text has the form of a literal, but a digit is not in its base.
    """
    clock, based = _CLOCK.fullmatch(text), _ALPHANUMERIC.fullmatch(text)
    if clock and int(clock[1]) < 25:
        half = f" {clock[4].lower()}m" if clock[4] else ""
        return Words(f"{int(clock[1])}:{clock[2]}{clock[3] or ''}{half}")
    if _DATE.fullmatch(text):
        return Words(text)
    if based and based["hexadecimal"]:
        return in_base(based["hexadecimal"].upper(), "16")
    if based and not based["digits"].isdigit():
        return in_base(based["digits"], based["base"])
    return None


def in_base(digits: str, base: str) -> Based:
    """Parse digits in the base of their subscript.

    Raises:
        Unreadable: The base is invalid, or a digit is not in it.
    """
    value = _BASES.get(base.lower()) or (int(base) if re.fullmatch(r"[0-9]{1,2}", base) else 0)
    try:
        if not 1 < value < 37:
            raise ValueError
        int(digits, value)
    except ValueError:
        raise Unreadable(digits) from None
    return Based(digits.lstrip("0") or "0", value)
