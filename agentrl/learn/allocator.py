"""Give memory that tensors no longer use back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def return_freed_memory() -> None:
    """Return the freed memory of this process to the system, where the C library is glibc.

    It keeps the memory of freed activations otherwise, in pieces that the tensors of the next rollout do not
    fit into, so that the process grows from step to step.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
