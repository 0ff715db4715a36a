"""What a place for values has to be able to do to become a ``KVStore`` (see ``store.Store``).

A backend may take as long as it likes and raise StorageUnavailableError: deadlines, pauses after failures and most
counting are done around it. It works a call's blocks in order and notes each as soon as it is done, because the call
may end at any time; what has not been noted by then has not happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.storage.block_format import Value
from kvstore.storage.calls import GetCall, PutCall
from kvstore.storage.interface import StoreCounters, StoreStats, VerifyReport


class Backend(Protocol):
    """One place for the values of one geometry. All methods are called from one event loop and do not block it.

    Methods without a description are as in ``KVStore``.
    """

    counters: StoreCounters
    """Of these it keeps ``corrupt_blocks`` and ``evicted_blocks``, and ``errors`` of single blocks."""

    async def open(self) -> None: ...

    async def put(self, call: PutCall) -> None:
        """Store what ``call`` packs; note each block in ``call.outcomes``."""

    async def get(self, call: GetCall) -> None:
        """Read values and ``call.deliver`` them; count and delete the bad ones."""

    async def contains(self, block_hashes: Sequence[bytes]) -> list[bool]:
        """Return which blocks are there."""

    async def delete(self, block_hashes: Sequence[bytes]) -> int: ...

    async def clear(self) -> int: ...

    async def stats(self) -> StoreStats: ...

    async def verify(self) -> VerifyReport: ...

    async def close(self) -> None: ...


class LocalBackend(Backend, Protocol):
    """A backend on this host, whose values can be served to others as they are."""

    async def read_values(self, block_hashes: Sequence[bytes]) -> list[Value | None]:
        """Return the values of blocks, checked, each in memory of its own; None for what is not there."""
