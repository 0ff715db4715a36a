"""Weights of linear layers in int8, and what computing with them rounds away.

``w8a16``: weights are whole numbers from -127 to 127 and one scale for each output, what they are multiplied with is as
without. ``w8a8``: each row that is multiplied is int8 as well, with a scale of its own, found anew each time; products
are then sums of integers, exact in any order.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

LARGEST = 127
"""-128 is left out, so that a number and its negative are as far from zero."""


class Quantization(StrEnum):
    """``engine.quantization``."""

    NONE = "none"
    W8A8 = "w8a8"
    W8A16 = "w8a16"


def quantize_rows(rows: Float32) -> tuple[Int8, Float32]:
    """Return ``rows`` [n, width] as int8 and scales [n], with which they are ``int8 * scale`` but for rounding."""
    furthest = np.abs(rows).max(axis=1)
    with np.errstate(divide="ignore"):
        factors = np.where(furthest > 0, np.float32(LARGEST) / furthest, np.float32(0))
    return np.rint(rows * factors[:, None]).astype(np.int8), furthest / np.float32(LARGEST)


def rounded_rows(rows: Float32) -> Float32:
    """Return what is left of ``rows`` when each of them has been int8."""
    values, scales = quantize_rows(rows)
    return values * scales[:, None]
