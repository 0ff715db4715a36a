"""The interface of a storage backend. ``store.Store`` makes a ``KVStore`` of it.

A backend may take any time and raise StorageUnavailableError: ``Store`` handles deadlines, pauses after failures and
most counters. A backend processes a call's blocks in order and records each when it is done, because the call may end
at any time. Blocks that are not recorded by then count as not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.storage.block_format import Value
from kvstore.storage.calls import GetCall, PutCall
from kvstore.storage.interface import StoreCounters, StoreStats, VerifyReport


class Backend(Protocol):
    """Stores the values of one geometry. All methods are called from one event loop and must not block it.

    Methods without a docstring are described in ``KVStore``.
    """

    counters: StoreCounters
    """The backend counts ``corrupt_blocks``, ``evicted_blocks``, and ``errors`` of single blocks."""

    async def open(self) -> None: ...

    async def put(self, call: PutCall) -> None:
        """Store the values that ``call`` packs; record each block in ``call.outcomes``."""

    async def get(self, call: GetCall) -> None:
        """Read values and ``call.deliver`` them; count and delete damaged ones."""

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        """Return which blocks are stored."""

    async def delete(self, block_hashes: Sequence[bytes]) -> int: ...

    async def clear(self) -> int: ...

    async def stats(self) -> StoreStats: ...

    async def verify(self) -> VerifyReport: ...

    async def close(self) -> None: ...


class LocalBackend(Backend, Protocol):
    """A backend on this host, whose values can be served to other hosts."""

    async def read_values(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        """Return the verified values of blocks, each in its own memory; None for missing blocks."""
