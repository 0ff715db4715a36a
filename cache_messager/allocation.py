"""malloc settings for freed memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_LARGEST_KEPT_BYTES = 32 << 20
_MOST_KEPT_BYTES = 256 << 20


def keep_freed_memory() -> None:
    """Keep freed memory for the next frame instead of returning it to the system.

    Allocating and zeroing it again would cost as much as the copy itself. At most the peak use is kept, which credits
    bound. Has no effect with a C library without ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # so that memory allocated by ZMQ's thread and freed here can be reused there
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
