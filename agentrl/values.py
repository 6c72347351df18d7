"""Turn what comes from outside, such as an environment's answers, into plain Python values, or say why not.

Numbers of numpy, Fraction and Decimal become Python's, texts of a subclass plain ones. Nothing is guessed:
what has no plain value is a fault, and named.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_TEXT_CHARS = 1_000_000  # characters
MAX_INTEGER_BITS = 1024  # of an integer: more would be no number to whoever reads the JSON
MAX_DEPTH = 16
MAX_ITEMS = 10_000
MAX_MESSAGE_CHARS = 4_000  # characters of an error that are kept


class ValueFaultError(Exception):
    """Says what is wrong with a value, as in `is {1, 2} (set), wanted text`."""


def as_text(value: object, most: int | None = MAX_TEXT_CHARS) -> str:
    """Return a text as a plain str that can be written as UTF-8.

    Args:
        value: a str or one of numpy's.
        most: characters; None for any number.

    Raises:
        ValueFaultError: it is none, is longer, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a str")
    text = str.__str__(value)
    if most is not None and len(text) > most:
        raise ValueFaultError(f"has {len(text):,} characters, wanted at most {most:,}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueFaultError(
                f"holds a lone surrogate at character {error.start}, which is no text"
            ) from error
    return text


def as_flag(value: object) -> bool:
    """Return a bool or one of numpy's as a bool.

    Raises:
        ValueFaultError: it is neither.
    """
    value = _unboxed(value)
    if not isinstance(value, bool | np.bool_):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a bool")
    return bool(value)


def as_number(value: object) -> float:
    """Return a finite real number of any kind as a float.

    Raises:
        ValueFaultError: it is no real number, or none that a float can hold.
    """
    value = _unboxed(value)
    if isinstance(value, Real | Decimal | np.bool_):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueFaultError(f"is {describe_value(value)}, wanted a finite real number")


def as_key(value: object) -> str | int:
    """Return a text or an integer that tells things apart.

    Raises:
        ValueFaultError: it is neither, or too long.
    """
    value = _unboxed(value)
    if isinstance(value, Integral | np.bool_):
        return _as_integer(value)
    if not isinstance(value, str):
        raise ValueFaultError(f"is {describe_value(value)}, wanted str or int")
    return as_text(value)


def as_json(value: object) -> Any:
    """Return what JSON can hold: null, bools, numbers, texts, and lists and mappings of these.

    Raises:
        ValueFaultError: something in it is none of these, or there is too much of it.
    """
    return _as_json(value, MAX_DEPTH, [MAX_ITEMS])


def _as_json(value: object, deepest: int, left: list[int]) -> Any:
    value = _unboxed(value)
    left[0] -= 1
    if left[0] < 0:
        raise ValueFaultError(f"holds more than {MAX_ITEMS:,} values")
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return _as_integer(value)
    if isinstance(value, Real | Decimal):
        return as_number(value)
    if isinstance(value, str):
        return as_text(value)
    if not isinstance(value, Mapping | list | tuple | np.ndarray):
        raise ValueFaultError(
            f"is {describe_value(value)}, wanted null, a bool, a number, text, a list or a mapping of text to "
            "these"
        )
    if deepest == 0:
        raise ValueFaultError(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            try:
                plain[as_text(key)] = _as_json(item, deepest - 1, left)
            except ValueFaultError as fault:
                where = "has a key that" if not isinstance(key, str) else f"at {describe_value(key)}"
                raise ValueFaultError(f"{where} {fault}") from fault
        return plain
    if isinstance(value, np.ndarray) and value.size > MAX_ITEMS:
        raise ValueFaultError(f"holds more than {MAX_ITEMS:,} values")
    return [_as_json(item, deepest - 1, left) for item in value]


def as_text_list(value: object) -> list[str]:
    """Return a list, a tuple or an array of texts as a list.

    Raises:
        ValueFaultError: it is none of these, or holds something else.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = list(value)
    if not isinstance(value, list | tuple):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a list of str")
    texts = []
    for item in value:
        if not isinstance(item, str):
            raise ValueFaultError(f"holds {describe_value(item)}, wanted only str")
        try:
            texts.append(as_text(item))
        except ValueFaultError as fault:
            raise ValueFaultError(f"holds {describe_value(item)}, which {fault}") from fault
    return texts


def describe_value(value: object) -> str:
    """Describe a value for a message: its repr, cut, and its type; whatever it is, this does not fail."""
    if isinstance(value, str | bytes):
        value, kind = value[:200], type(value).__name__
    else:
        kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:  # of an integer with thousands of digits, or as its class would have it
        text = "a value without a repr"
    return f"{storable(text if len(text) <= 80 else text[:80] + '…')} ({kind})"


def describe_error(error: BaseException) -> str:
    """Return the type and message of somebody else's exception, as text that can be kept."""
    try:
        message = str(error)
    except BaseException:
        message = "a message that cannot be read"
    return storable(f"{type(error).__name__}: {message}")


def storable(text: str) -> str:
    """Return a text that can be written as UTF-8 and is not endless: surrogates escaped, the rest cut."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    return f"{text[: MAX_MESSAGE_CHARS - 40]}… ({len(text):,} characters)"


def _unboxed(value: object) -> object:
    """The one value of an array without dimensions."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _as_integer(value: Any) -> int:
    number = int(value)
    if number.bit_length() > MAX_INTEGER_BITS:
        raise ValueFaultError(
            f"is an integer of {number.bit_length():,} bits, wanted at most {MAX_INTEGER_BITS:,}"
        )
    return number
