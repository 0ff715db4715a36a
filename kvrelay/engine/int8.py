"""Int8 quantization of linear layers.

``w8a16``: weights are integers from -127 to 127 with one scale per output; activations are not quantized. ``w8a8``:
activations are int8 too, with one scale per row, computed in each step. Sums are then integers and exact in any order.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

LARGEST = 127
"""-128 is not used, so that the range is symmetric."""


class Quantization(StrEnum):
    """``engine.quantization``."""

    NONE = "none"
    W8A8 = "w8a8"
    W8A16 = "w8a16"


def quantize_rows(rows: Float32) -> tuple[Int8, Float32]:
    """Return ``rows`` [n, width] as int8 and scales [n]: ``int8 * scale`` is the rounded row."""
    furthest = np.abs(rows).max(axis=1)
    with np.errstate(divide="ignore"):
        factors = np.where(furthest > 0, np.float32(LARGEST) / furthest, np.float32(0))
    return np.rint(rows * factors[:, None]).astype(np.int8), furthest / np.float32(LARGEST)


def rounded_rows(rows: Float32) -> Float32:
    """Return ``rows`` rounded to int8 precision."""
    values, scales = quantize_rows(rows)
    return values * scales[:, None]
