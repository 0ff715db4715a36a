"""The highest logit that a grammar allows: found by the native library, or by numpy without it."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from kvrelay.engine.native.library import NativeLibrary
from kvrelay.errors import KernelsUnavailableError

Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]


def highest_allowed(row: Float32, words: Words) -> int | None:
    """Return the first of the highest logits in ``row`` [vocab_size] whose bits in ``words`` are set, 32 to a word.

    None if none of them is above minus infinity. Both must be contiguous.
    """
    library = _library()
    if library is None:
        return highest_allowed_by_numpy(row, words)
    token: int = library.highest_allowed(row.ctypes.data, words.ctypes.data, len(row))
    return token if token >= 0 else None


def highest_allowed_by_numpy(row: Float32, words: Words) -> int | None:
    """Return what ``highest_allowed`` does."""
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little", count=len(row)).view(np.bool_)
    logits = np.where(allowed, row, np.float32(-np.inf))
    token = int(np.argmax(logits))
    return token if logits[token] > -np.inf else None


@functools.cache
def _library() -> NativeLibrary | None:
    try:
        return NativeLibrary(openmp=None)
    except KernelsUnavailableError:
        return None
