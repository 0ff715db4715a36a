"""glibc malloc settings that return freed memory to the system."""

from __future__ import annotations

import ctypes
import sys

LARGE_BYTES = 1 << 20

KEPT_BYTES = 8 << 20
"""Free bytes kept at the end of the heap. Returning and requesting them for each request would take time."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_large_blocks() -> None:
    """Allocate every block of at least ``LARGE_BYTES`` as a separate mapping, which is unmapped when freed.

    By default glibc raises this threshold to the largest freed block and keeps the memory of long request bodies.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no mallopt and does not need it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
            mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
