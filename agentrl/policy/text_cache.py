"""What was computed of texts and token ids, kept as long as it fits into so many bytes; stdlib only."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, TypeVar, cast

CACHED_BYTES = 64 * 2**20  # of one cache
ENTRY_BYTES = 256  # of an entry beside its key and value, at most
INT_BYTES = 32

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TextCache:
    """Results of functions of one argument; those that were used longest ago are forgotten first.

    Several functions share the bound. A result that is larger than all of it is not kept.

    Args:
        limit: bytes of keys and results together.

    Attributes:
        bytes: of what is kept now, never above the limit.
    """

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[tuple[object, Any], tuple[Any, int]] = OrderedDict()
        self._lock = Lock()  # an evaluation may read while a rollout plays

    def __len__(self) -> int:
        return len(self._entries)

    def memoize(
        self, function: Callable[[Key], Value], size: Callable[[Value], int] | None = None
    ) -> Callable[[Key], Value]:
        """Return a function of the same results, which are kept here.

        Args:
            function: pure, of a hashable argument.
            size: bytes of a result; None takes `size_of`.
        """
        weigh = size_of if size is None else size

        def memoized(key: Key) -> Value:
            name = (function, key)
            with self._lock:
                found = self._entries.get(name)
                if found is not None:
                    self._entries.move_to_end(name)
                    return cast(Value, found[0])
            value = function(key)
            self._store(name, value, ENTRY_BYTES + size_of(key) + weigh(value))
            return value

        return memoized

    def _store(self, name: tuple[object, Any], value: Any, size: int) -> None:
        with self._lock:
            if name in self._entries or size > self.limit:
                return
            while self.bytes + size > self.limit:
                self.bytes -= self._entries.popitem(last=False)[1][1]
            self._entries[name] = (value, size)
            self.bytes += size


def size_of(value: object) -> int:
    """Return the bytes of a text, a number, a record or nested tuples of them; no object is shared.

    >>> size_of((1, 2)) == sys.getsizeof((1, 2)) + 2 * INT_BYTES
    True
    """
    if isinstance(value, tuple):
        inner = INT_BYTES * len(value) if set(map(type, value)) <= {int} else sum(map(size_of, value))
        return sys.getsizeof(value) + inner
    if is_dataclass(value):
        return sys.getsizeof(value) + sum(size_of(getattr(value, field.name)) for field in fields(value))
    return sys.getsizeof(value)
