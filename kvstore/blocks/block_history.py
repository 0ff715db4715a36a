"""What was last done with the blocks of a pool, for reports of violated laws."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvrelay.protocol.ids import BlockId

MAX_OPERATIONS = 1024
MAX_BLOCK_IDS = 1 << 15
"""Block ids remembered over all operations: 256 KiB."""


class BlockHistory:
    """The last operations of a pool, as many as there is room for.

    ``now``: the time of the operations recorded next, in seconds; the pool's owner sets it. ``num_operations`` counts
    all since the start.
    """

    __slots__ = ("_num_ids", "_operations", "now", "num_operations")

    def __init__(self) -> None:
        self.now = 0.0
        self.num_operations = 0
        self._num_ids = 0
        self._operations: deque[tuple[str, float, tuple[BlockId, ...]]] = deque()

    def record(self, operation: str, block_ids: Sequence[BlockId]) -> None:
        """Note that ``operation`` was done with ``block_ids``."""
        self.num_operations += 1
        self._operations.append((operation, self.now, tuple(block_ids)))
        self._num_ids += len(block_ids)
        while self._num_ids > MAX_BLOCK_IDS or len(self._operations) > MAX_OPERATIONS:
            self._num_ids -= len(self._operations.popleft()[2])

    def of(self, block: int) -> list[str]:
        """Return what was done with ``block`` and when, in order. Looks at every operation remembered."""
        return [f"{operation} at {at_s:.6f}" for operation, at_s, blocks in self._operations if block in blocks]
