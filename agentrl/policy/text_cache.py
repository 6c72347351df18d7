"""A cache of function results on texts and token ids, bounded in bytes; standard library only."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, TypeVar, cast

CACHED_BYTES = 64 * 2**20  # the default limit of one cache
ENTRY_BYTES = 256  # the most that an entry takes beside its key and value
INT_BYTES = 32

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TextCache:
    """LRU cache of the results of one-argument functions, which share its limit.

    A result that is larger than the limit is not stored.

    Args:
        limit: The largest total size of keys and results, in bytes.

    Attributes:
        bytes: The current size in bytes, never above the limit.
    """

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[tuple[object, Any], tuple[Any, int]] = OrderedDict()
        self._lock = Lock()  # evaluation and rollout threads share it

    def __len__(self) -> int:
        return len(self._entries)

    def memoize(
        self, function: Callable[[Key], Value], size: Callable[[Value], int] | None = None
    ) -> Callable[[Key], Value]:
        """Return a function that looks its results up here before it computes them.

        Args:
            function: A pure function of one hashable argument.
            size: The size of a result in bytes; None takes `size_of`.
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
    """Return the size in bytes of a text, a number, a dataclass or nested tuples, as if no object is shared.

    >>> size_of((1, 2)) == sys.getsizeof((1, 2)) + 2 * INT_BYTES
    True
    """
    if isinstance(value, tuple):
        inner = INT_BYTES * len(value) if set(map(type, value)) <= {int} else sum(map(size_of, value))
        return sys.getsizeof(value) + inner
    if is_dataclass(value):
        return sys.getsizeof(value) + sum(size_of(getattr(value, field.name)) for field in fields(value))
    return sys.getsizeof(value)
