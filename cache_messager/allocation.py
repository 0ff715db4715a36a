"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_LARGEST_KEPT_BYTES = 32 << 20
_MOST_KEPT_BYTES = 256 << 20


def keep_freed_memory() -> None:
    """Keep freed memory for the next frame, instead of giving it back and having it made and zeroed anew each time.

    That would cost as much as the copy itself. Kept is at most what was in use at once, which credits bound. A C
    library without ``mallopt`` does as it likes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # what ZMQ's thread takes and this one frees goes back to where it came from
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
