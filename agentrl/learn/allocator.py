"""Give memory that tensors no longer use back to the system."""

import ctypes
from functools import cache

LARGE_HEAP = 2**30  # bytes; to give back less takes longer, beside a pass that frees so little, than it helps


class _HeapInfo(ctypes.Structure):
    """The result of glibc's mallinfo2; `fordblks` is what it keeps of freed memory, in bytes."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def return_freed_memory(*, above: int = 0) -> None:
    """Return the freed memory of this process to the system, where the C library is glibc.

    It keeps the memory of freed activations otherwise, in pieces that the tensors of the next rollout, or of
    a pass over rows of other lengths, do not fit into, so that the process grows from pass to pass.

    Args:
        above: The number of freed bytes up to which they are kept.
    """
    library = _glibc()
    if library is not None and (not above or library.mallinfo2().fordblks > above):
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it has both functions, which glibc has from 2.33 on; else None."""
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = _HeapInfo
        library.malloc_trim.argtypes = (ctypes.c_size_t,)
    except (OSError, AttributeError):
        return None
    return library
