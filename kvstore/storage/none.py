"""Backend ``none``: stores nothing."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.storage.block_format import Value
from kvstore.storage.calls import GetCall, PutCall
from kvstore.storage.interface import StoreCounters, StoreStats, VerifyReport


class NoBackend:
    """Every put fails and every get misses, without errors. ``name``: the backend whose store does not exist yet."""

    def __init__(self, name: str = "none") -> None:
        self.counters = StoreCounters()
        self._name = name

    async def open(self) -> None:
        """Do nothing."""

    async def put(self, call: PutCall) -> None:
        """Store nothing."""

    async def get(self, call: GetCall) -> None:
        """Find nothing."""

    async def read_values(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        return [None] * len(block_hashes)

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        return [False] * len(block_hashes)

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        return 0

    async def clear(self) -> int:
        return 0

    async def stats(self) -> StoreStats:
        """Return zero blocks and zero capacity."""
        return StoreStats(self._name, 0, 0, 0)

    async def verify(self) -> VerifyReport:
        """Return an empty report."""
        return VerifyReport(0, 0)

    async def close(self) -> None:
        """Do nothing."""
