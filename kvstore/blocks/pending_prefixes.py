"""Blocks that running prefills of this node will publish soon."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class PendingPrefixes:
    """Hashes of the blocks that running prefills of this node have still to compute, by owner.

    A request that needs such a block next should wait for it instead of computing it too. Prompts that arrive together
    thus share a common prefix. An entry ends when the block is published or its owner ends.
    """

    __slots__ = ("_counts", "_remaining")

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._remaining: dict[Hashable, tuple[Sequence[bytes], int]] = {}

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, owner: Hashable, hashes: Sequence[bytes], first_block: int) -> None:
        """Record that ``owner`` computes the blocks of ``hashes`` from ``first_block`` on."""
        self._remaining[owner] = (hashes, first_block)
        counts = self._counts
        for block_hash in hashes[first_block:]:
            counts[block_hash] = counts.get(block_hash, 0) + 1

    def published(self, owner: Hashable, num_blocks: int) -> None:
        """Record that the first ``num_blocks`` blocks of ``owner`` are published."""
        remaining = self._remaining.get(owner)
        if remaining is not None and num_blocks > remaining[1]:
            hashes, first_block = remaining
            self._settle(hashes[first_block:num_blocks])
            self._remaining[owner] = (hashes, num_blocks)

    def withdraw(self, owner: Hashable) -> None:
        """Remove what remains of ``owner``."""
        hashes, first_block = self._remaining.pop(owner, ((), 0))
        self._settle(hashes[first_block:])

    def _settle(self, hashes: Sequence[bytes]) -> None:
        counts = self._counts
        for block_hash in hashes:
            if counts[block_hash] == 1:
                del counts[block_hash]
            else:
                counts[block_hash] -= 1
