"""Sets of a request's block positions as bits of an integer: position ``p`` is in the set if bit ``p`` is set.

Signals and frames cover consecutive positions, so creation, comparison and union of sets are one operation each for any
prompt length.
"""

from __future__ import annotations

from kvrelay.protocol.ids import BlockId


def all_within(block_ids: list[BlockId], num_blocks: int) -> bool:
    """Return whether all of ``block_ids`` are in a pool of ``num_blocks``."""
    return not block_ids or (min(block_ids) >= 0 and max(block_ids) < num_blocks)


def mask_of(first: int, count: int) -> int:
    """Return the set of ``count`` positions from ``first`` on."""
    return ((1 << count) - 1) << first


def runs_of(mask: int) -> list[tuple[int, int]]:
    """Return ``mask`` as (first, count) runs of consecutive positions, lowest first."""
    runs: list[tuple[int, int]] = []
    base = 0
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        count = (~mask & (mask + 1)).bit_length() - 1
        runs.append((base + gap, count))
        mask >>= count
        base += gap + count
    return runs
