"""The blocks of one node: a free list and reference counts.

Methods that take many blocks check all of them before they change any. An error leaves the pool unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.laws import Laws, Violation, parts_of
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.block_history import BlockHistory

FREE = -1
"""Reference count of a block on the free list. 0: a block without references that the prefix cache keeps."""


class BlockPool:
    """``num_blocks`` blocks with ids from 0, initially free.

    The free list is a stack, and blocks are returned in reverse order. Blocks that were allocated consecutively are
    therefore allocated consecutively again, and transfers find long runs of ids.
    """

    __slots__ = ("_free", "_ref_counts", "history", "num_allocated", "num_blocks", "num_recycled", "num_referenced")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_allocated = 0
        """Blocks taken from the free list since the start."""
        self.num_recycled = 0
        """Blocks returned to the free list since the start."""
        self.num_referenced = 0
        """Blocks with references."""
        self.history = BlockHistory()
        self._free: list[BlockId] = [BlockId(index) for index in range(num_blocks - 1, -1, -1)]
        self._ref_counts = [FREE] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return len(self._free)

    def ref_count(self, block: BlockId) -> int:
        """Return the number of references to ``block``; 0: kept by the prefix cache; FREE: free."""
        return self._ref_counts[block]

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Take blocks from the free list, with one reference each.

        Raises LocalProtocolError if there are not as many.
        """
        if not 0 <= num_blocks <= len(self._free):
            raise LocalProtocolError(f"allocate {num_blocks} blocks: {len(self._free)} of {self.num_blocks} are free")
        keep = len(self._free) - num_blocks
        taken = self._free[keep:]
        taken.reverse()
        del self._free[keep:]
        ref_counts = self._ref_counts
        for block in taken:
            ref_counts[block] = 1
        self.num_allocated += num_blocks
        self.num_referenced += num_blocks
        self.history.record("allocate", taken)
        return taken

    def pin(self, block_ids: Sequence[BlockId]) -> list[BlockId]:
        """Add one reference to each block; return those that had none, in the order given.

        Raises LocalProtocolError if a block is free or unknown, or named twice.
        """
        self.require("pin", block_ids, min_refs=0)
        ref_counts = self._ref_counts
        first_refs = [block for block in block_ids if not ref_counts[block]]
        for block in block_ids:
            ref_counts[block] += 1
        self.num_referenced += len(first_refs)
        self.history.record("pin", block_ids)
        return first_refs

    def unpin(self, block_ids: Sequence[BlockId]) -> list[BlockId]:
        """Take one reference from each block; return those that have none left, in reverse order.

        They are not free yet: the caller keeps them or recycles them. Raises LocalProtocolError if a block has no
        reference, is unknown, or is named twice.
        """
        self.require("unpin", block_ids, min_refs=1)
        ref_counts = self._ref_counts
        last_refs: list[BlockId] = []
        for block in reversed(block_ids):
            refs = ref_counts[block] - 1
            ref_counts[block] = refs
            if not refs:
                last_refs.append(block)
        self.num_referenced -= len(last_refs)
        self.history.record("unpin", block_ids)
        return last_refs

    def recycle(self, block_ids: Sequence[BlockId]) -> None:
        """Put blocks without references on the free list, in one batch; the last one given is allocated next.

        Raises LocalProtocolError if a block is still referenced, free already, unknown, or named twice.
        """
        self.require("recycle", block_ids, min_refs=0, max_refs=0)
        ref_counts = self._ref_counts
        for block in block_ids:
            ref_counts[block] = FREE
        self._free += block_ids
        self.num_recycled += len(block_ids)
        self.history.record("recycle", block_ids)

    def require(self, operation: str, block_ids: Sequence[BlockId], min_refs: int, max_refs: int | None = None) -> None:
        """Raise LocalProtocolError with ``operation`` and the first invalid block, unless all blocks are valid.

        They must be known, all different, and have ``min_refs`` to ``max_refs`` references each.
        """
        if not block_ids:
            return
        if min(block_ids) < 0 or max(block_ids) >= self.num_blocks:
            raise LocalProtocolError(
                f"{operation}: no such block in a pool of {self.num_blocks}: "
                f"{next(block for block in block_ids if not 0 <= block < self.num_blocks)}"
            )
        if len(set(block_ids)) < len(block_ids):
            twice = next(block for block in block_ids if block_ids.count(block) > 1)
            raise LocalProtocolError(f"{operation}: block {twice} is named twice in one call")
        ref_counts = self._ref_counts
        if min(map(ref_counts.__getitem__, block_ids)) < min_refs:
            self._refuse(operation, next(block for block in block_ids if ref_counts[block] < min_refs))
        if max_refs is not None and max(map(ref_counts.__getitem__, block_ids)) > max_refs:
            self._refuse(operation, next(block for block in block_ids if ref_counts[block] > max_refs))

    def _refuse(self, operation: str, block: BlockId) -> None:
        raise LocalProtocolError(f"{operation}: block {block} {self.describe(block)}")

    def describe(self, block: BlockId) -> str:
        """Return the state of ``block`` as text."""
        refs = self._ref_counts[block]
        if refs == FREE:
            return "is free"
        if refs == 0:
            return "has no references and is kept by the prefix cache"
        return f"has {refs} reference{'s' * (refs > 1)}"

    def referenced(self) -> list[BlockId]:
        """Return the blocks with references, by id. Scans the whole pool."""
        return [BlockId(index) for index, refs in enumerate(self._ref_counts) if refs > 0]

    def laws(self) -> Laws:
        """Check the pool by itself; see ``kvrelay.machine.laws``."""
        free, ref_counts = self._free, self._ref_counts
        on_list = bytearray(self.num_blocks)
        num_named_again = num_referenced = 0
        for part in parts_of(len(free)):
            found = []
            for block in free[part.start : part.stop]:
                num_named_again += on_list[block]
                on_list[block] = 1
                if ref_counts[block] != FREE:
                    found.append(Violation(f"block {block} is on the free list but {self.describe(block)}", block))
            yield found
        for part in parts_of(self.num_blocks):
            found = []
            for block in map(BlockId, part):
                refs = ref_counts[block]
                num_referenced += refs > 0
                if refs == FREE and not on_list[block]:
                    found.append(Violation(f"block {block} is counted free but not on the free list", block))
            yield found
        yield list(self._total_violations(num_named_again, num_referenced))

    def _total_violations(self, num_named_again: int, num_referenced: int) -> Iterator[Violation]:
        if num_named_again:
            yield Violation(f"the free list names {num_named_again} blocks more than once")
        if self.num_allocated - self.num_recycled != self.num_blocks - len(self._free):
            yield Violation(
                f"{self.num_allocated} allocated - {self.num_recycled} recycled "
                f"!= {self.num_blocks - len(self._free)} blocks off the free list"
            )
        if self.num_referenced != num_referenced:
            yield Violation(f"{self.num_referenced} blocks are counted referenced, {num_referenced} are")
