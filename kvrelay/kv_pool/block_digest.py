"""Digests of blocks on a device: what a kernel can compute while it copies, and numpy for the same bytes.

A block's digest is the sum of its 64-bit words, each mixed with its place in the block. Sums do not depend on the order
in which threads add. A frame's digest is the same sum over the digests of its blocks, plane by plane.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.int64]

PLACE_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_FACTORS = 0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64)
MIX_SHIFT = 33
MIX_MASK = (1 << (64 - MIX_SHIFT)) - 1
"""What is left of a signed word that is shifted, to shift it as an unsigned one."""

_ALL = (1 << 64) - 1


def digest_blocks(words: Words) -> Words:
    """Return the digest of each block of ``words`` [..., words of a block]."""
    places = np.arange(1, words.shape[-1] + 1, dtype=np.int64)
    with np.errstate(over="ignore"):
        mixed: Words = _mix(words ^ (places * np.int64(PLACE_FACTOR))).sum(-1, dtype=np.int64)
    return mixed


def fold(digests: Words) -> int:
    """Return one digest, never 0, of the digests of blocks, whose order counts."""
    return (int(digest_blocks(digests.reshape(-1))) & _ALL) or 1


def _mix(words: Words) -> Words:
    """Return MurmurHash3's 64-bit finaliser of each word: a bijection in which each bit changes every other."""
    for factor in MIX_FACTORS:
        words = (words ^ ((words >> MIX_SHIFT) & MIX_MASK)) * np.int64(factor)
    return words ^ ((words >> MIX_SHIFT) & MIX_MASK)
