"""Memory that goes back to the system when it is free."""

from __future__ import annotations

import ctypes
import sys

LARGE_BYTES = 1 << 20

KEPT_BYTES = 8 << 20
"""What is free at the end of the heap stays: to give it back and ask for it again with every request takes time."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_large_blocks() -> None:
    """Have every block of ``LARGE_BYTES`` and more be a mapping of its own, which ends when the block is freed.

    glibc would raise that size to the largest block it has seen, and keep the memory of every long request body.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and no need of it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
            mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
