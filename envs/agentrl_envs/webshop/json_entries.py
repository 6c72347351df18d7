"""Streaming reader of large JSON files: one entry of the outermost list or object at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from agentrl.errors import ConfigError

CHUNK = 1 << 22  # characters read at a time
LONGEST = 1 << 26  # characters of one entry; a longer one has an unclosed bracket
SPACE = " \t\r\n"
FOLLOWING = (*SPACE, ",", ":", "]", "}")

_DECODER = json.JSONDecoder()


def entries(path: Path, what: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Open a JSON file and iterate over the entries of its list or object.

    Args:
        path: The path of the file.
        what: The name of the file in error messages.

    Returns:
        The kind, "list" or "object", and an iterator of (key, value); the keys of a list are "0", "1", …

    Raises:
        ConfigError: The file is missing or unreadable or, while iterating, truncated or malformed.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from error
    reader = _Reader(file, f"{what} {path}")
    opening = reader.peek()
    if opening not in ("[", "{"):
        file.close()
        found = "is empty" if not opening else f"starts with {opening!r}"
        raise ConfigError(f"{what} {path}: {found}, wanted a JSON list or object")
    return ("list" if opening == "[" else "object"), _entries(reader, file)


def _entries(reader: "_Reader", file: TextIO) -> Iterator[tuple[str, Any]]:
    with file:
        closing = "]" if reader.take() == "[" else "}"
        if reader.peek() == closing:
            return
        count = 0
        while True:
            key = str(count)
            if closing == "}":
                key = reader.value()
                if not isinstance(key, str) or reader.peek() != ":":
                    raise reader.broken("wanted a key")
                reader.take()
            yield key, reader.value()
            count += 1
            mark = reader.peek()
            if mark == closing:
                return
            if mark != ",":
                raise reader.broken(f"wanted ',' or {closing!r} after entry {count}")
            reader.take()


class _Reader:
    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def broken(self, why: str) -> ConfigError:
        """Return the error for the current position."""
        place = self._before + self._at
        if self._ended and self._at >= len(self._text):
            return ConfigError(f"{self._name}: truncated: it ends after {place:,} characters, {why}")
        return ConfigError(f"{self._name}: invalid JSON at character {place:,}: {why}")

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(CHUNK):
                return ""

    def take(self) -> str:
        """Consume and return the next character."""
        self._at += 1
        return self._text[self._at - 1]

    def value(self) -> Any:
        """Decode the next value."""
        if not self.peek():
            raise self.broken("wanted a value")
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                fault: Exception | None = error
            else:
                fault = None
                if (
                    self._text[end : end + 1] in FOLLOWING
                ):  # otherwise a number may continue in the next chunk
                    self._at = end
                    return value
            if len(self._text) - self._at > LONGEST:
                raise self.broken("an entry is not closed")
            if not self._more(size):
                raise ConfigError(
                    f"{self._name}: truncated or invalid JSON: the entry that starts at character "
                    f"{self._before + self._at:,} cannot be read ({fault or 'nothing follows it'})"
                )
            size *= 2

    def _more(self, size: int) -> bool:
        try:
            read = self._file.read(size)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._name}: not UTF-8: {error.reason} at byte {error.start}") from error
        if not read:
            self._ended = True
            return False
        self._text = self._text[self._at :] + read
        self._before += self._at
        self._at = 0
        return True
