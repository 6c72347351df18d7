"""Convert untrusted values, such as those an environment returns, to plain Python values, or say why not.

NumPy, Fraction and Decimal numbers become Python numbers, and instances of subclasses of str plain strings.
Nothing is guessed: a value without a plain equivalent raises `ValueFaultError`.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_TEXT_CHARS = 1_000_000
MAX_INTEGER_BITS = 1024  # JSON readers turn larger integers into infinity
MAX_DEPTH = 16
MAX_ITEMS = 10_000
MAX_MESSAGE_CHARS = 4_000  # of an error message; the rest is cut


class ValueFaultError(Exception):
    """Raised for an invalid value; the message is a predicate such as `is {1, 2} (set), wanted text`."""


def as_text(value: object, maximum: int | None = MAX_TEXT_CHARS) -> str:
    """Return a string as a plain str that can be encoded as UTF-8.

    Args:
        value: A str or an instance of a subclass, such as `numpy.str_`.
        maximum: The maximum length in characters; None for no limit.

    Raises:
        ValueFaultError: The value is not a string, is too long, or contains a lone surrogate.
    """
    if not isinstance(value, str):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a str")
    text = str.__str__(value)
    if maximum is not None and len(text) > maximum:
        raise ValueFaultError(f"has {len(text):,} characters, wanted at most {maximum:,}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueFaultError(
                f"contains a lone surrogate at character {error.start}, wanted valid Unicode"
            ) from error
    return text


def as_flag(value: object) -> bool:
    """Return a Python or NumPy bool as a Python bool.

    Raises:
        ValueFaultError: The value is not a bool.
    """
    value = _unboxed(value)
    if not isinstance(value, bool | np.bool_):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a bool")
    return bool(value)


def as_number(value: object) -> float:
    """Return a finite real number of any type as a float.

    Raises:
        ValueFaultError: The value is not a real number, or does not fit into a finite float.
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
    """Return a string or an integer that serves as an identifier.

    Raises:
        ValueFaultError: The value is neither, or is too long.
    """
    value = _unboxed(value)
    if isinstance(value, Integral | np.bool_):
        return _as_integer(value)
    if not isinstance(value, str):
        raise ValueFaultError(f"is {describe_value(value)}, wanted str or int")
    return as_text(value)


def as_json(value: object) -> Any:
    """Return a value as JSON types: null, bools, numbers, strings, and lists and mappings of these.

    Raises:
        ValueFaultError: A value has another type, or the structure is too deep or too large.
    """
    return _as_json(value, MAX_DEPTH, [MAX_ITEMS])


def _as_json(value: object, depth: int, left: list[int]) -> Any:
    """Convert a value, with limits on the depth and on the number of values left."""
    value = _unboxed(value)
    left[0] -= 1
    if left[0] < 0:
        raise ValueFaultError(f"contains more than {MAX_ITEMS:,} values")
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
            f"is {describe_value(value)}, wanted null, a bool, a number, text, a list or a mapping "
            "of text to these"
        )
    if depth == 0:
        raise ValueFaultError(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            try:
                plain[as_text(key)] = _as_json(item, depth - 1, left)
            except ValueFaultError as fault:
                where = "has a key that" if not isinstance(key, str) else f"at {describe_value(key)}"
                raise ValueFaultError(f"{where} {fault}") from fault
        return plain
    if isinstance(value, np.ndarray) and value.size > MAX_ITEMS:
        raise ValueFaultError(f"contains more than {MAX_ITEMS:,} values")
    return [_as_json(item, depth - 1, left) for item in value]


def as_text_list(value: object) -> list[str]:
    """Return a list, a tuple or a 1-D array of strings as a list.

    Raises:
        ValueFaultError: The value is none of these, or contains something other than strings.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = list(value)
    if not isinstance(value, list | tuple):
        raise ValueFaultError(f"is {describe_value(value)}, wanted a list of str")
    texts = []
    for item in value:
        if not isinstance(item, str):
            raise ValueFaultError(f"contains {describe_value(item)}, wanted only str")
        try:
            texts.append(as_text(item))
        except ValueFaultError as fault:
            raise ValueFaultError(f"contains {describe_value(item)}, which {fault}") from fault
    return texts


def describe_value(value: object) -> str:
    """Return the truncated repr of a value and its type, for a message; never fails."""
    if isinstance(value, str | bytes):
        value, kind = value[:200], type(value).__name__
    else:
        kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or an object with a broken __repr__
        text = "a value without a repr"
    return f"{storable(text if len(text) <= 80 else text[:80] + '…')} ({kind})"


def describe_error(error: BaseException) -> str:
    """Return the type and message of an exception from untrusted code, as text that can be stored."""
    try:
        message = str(error)
    except BaseException:
        message = "a message that cannot be read"
    return storable(f"{type(error).__name__}: {message}")


def storable(text: str) -> str:
    """Return a text with lone surrogates escaped, truncated to `MAX_MESSAGE_CHARS`."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    return f"{text[: MAX_MESSAGE_CHARS - 40]}… ({len(text):,} characters)"


def _unboxed(value: object) -> object:
    """Return the scalar inside a zero-dimensional array, and any other value unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _as_integer(value: Any) -> int:
    number = int(value)
    if number.bit_length() > MAX_INTEGER_BITS:
        raise ValueFaultError(
            f"is an integer of {number.bit_length():,} bits, wanted at most {MAX_INTEGER_BITS:,}"
        )
    return number
