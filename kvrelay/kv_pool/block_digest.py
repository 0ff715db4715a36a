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

_PIECE_BYTES = 256 << 10
"""Words that are mixed at a time, so that they stay in the core's cache."""


def digest_blocks(words: Words) -> Words:
    """Return the digest of each block of ``words`` [..., words of a block]."""
    blocks = words.reshape(-1, words.shape[-1])
    digests = np.empty(len(blocks), np.int64)
    at_a_time = max(1, _PIECE_BYTES // (words.itemsize * words.shape[-1]))
    with np.errstate(over="ignore"):
        places = np.arange(1, words.shape[-1] + 1, dtype=np.int64) * np.int64(PLACE_FACTOR)
        for first in range(0, len(blocks), at_a_time):
            piece = slice(first, first + at_a_time)
            _mix(blocks[piece] ^ places).sum(-1, dtype=np.int64, out=digests[piece])
    return digests.reshape(words.shape[:-1])


def fold(digests: Words) -> int:
    """Return one digest, never 0, of the digests of blocks, whose order counts."""
    return (int(digest_blocks(digests.reshape(-1))) & _ALL) or 1


def _mix(words: Words) -> Words:
    """Mix each word in place by MurmurHash3's 64-bit finaliser: a bijection in which each bit changes every other."""
    unsigned, shifted = words.view(np.uint64), np.empty(words.shape, np.uint64)
    for factor in MIX_FACTORS:
        unsigned ^= np.right_shift(unsigned, np.uint64(MIX_SHIFT), out=shifted)
        words *= np.int64(factor)
    unsigned ^= np.right_shift(unsigned, np.uint64(MIX_SHIFT), out=shifted)
    return words
