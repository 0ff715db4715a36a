"""The interface of a KV store. Its users are the nodes' shells and the ``kvrelay store`` command.

A block is named by its block hash (``kvstore.blocks.block_hash``) and holds the KV of all layers. Its bytes are in the
caller's memory, ``[num_layers, 2, plane_block_bytes]`` uint8 with any strides, as ``KVPool.lend`` gives it.

Memory: the caller lends the arrays of ``put`` and ``get`` for the call and must keep them (pin the blocks) until it
returns. Afterwards the store neither reads nor writes them, even if the deadline passed, the call was cancelled, or a
disk read still hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from kvrelay.kv_pool.interface import HostBlock

BlockView: TypeAlias = HostBlock
"""One block in the caller's memory."""


class PutOutcome(StrEnum):
    """Outcome of one block of a ``put``."""

    WRITTEN = "written"
    PRESENT = "present"
    """The store already had it; nothing was written."""
    FAILED = "failed"
    """Not stored: the store is full or down, or the deadline passed."""


@dataclass(slots=True)
class StoreCounters:
    """Totals of one store object; they never decrease."""

    hit_blocks: int = 0
    missed_blocks: int = 0
    """Requested by ``get`` and not delivered, for any reason."""
    corrupt_blocks: int = 0
    """Found but damaged; deleted, and counted as missed too."""
    read_bytes: int = 0
    """KV bytes of the hits."""
    written_blocks: int = 0
    present_blocks: int = 0
    failed_blocks: int = 0
    written_bytes: int = 0
    """KV bytes of the written blocks."""
    evicted_blocks: int = 0
    """Evicted by this object. Backends that evict themselves do not report it."""
    timeouts: int = 0
    """Calls that reached their deadline."""
    errors: int = 0
    """Calls in which the backend failed."""
    skipped: int = 0
    """Calls not passed to the backend because it has just failed."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Content of a backend for this geometry, over all processes that use it.

    ``used_bytes`` and ``capacity_bytes`` include the backend's own overhead; ``None``: the backend does not tell.
    """

    backend: str
    num_blocks: int | None
    used_bytes: int | None
    capacity_bytes: int | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of ``verify``: blocks read, and corrupt blocks, which are deleted."""

    num_blocks: int
    num_corrupt: int


class KVStore(Protocol):
    """Blocks by block hash, for one ``KVGeometry``: other models and shapes are not seen and not touched.

    All methods are called from one event loop, any number at a time, and never block it. ``put``, ``get``,
    ``longest_prefix`` and ``delete`` end within the configured ``timeout_s``, or a shorter one that is given, and raise
    nothing because of the backend: what it cannot do is a miss or a failed put, and counted. They raise
    LocalProtocolError for arguments that do not fit. The others are for operators and raise StorageUnavailableError if
    the backend cannot be reached or is not in time.
    """

    @property
    def counters(self) -> StoreCounters:
        """The totals, for heartbeats and metrics. No I/O."""

    async def open(self) -> None:
        """Open the store. Called once by a node when it starts, before any other method.

        A server that is down is no error: the store starts empty-handed and finds it later. Raises StorageError if the
        store can never work as configured; it is closed then.
        """

    async def put(self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> list[PutOutcome]:
        """Store ``blocks[i]`` as ``block_hashes[i]``. Called on preemption and when a request has finished.

        Blocks the store has are not written again. They are tried in order, so that what is stored at the deadline is
        the beginning of the sequence. May evict others.
        """

    async def get(
        self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView], timeout_s: float | None = None
    ) -> list[bool]:
        """Read ``block_hashes[i]`` into ``blocks[i]``; True where its KV now is. Called on admission and on resume.

        Where False, ``blocks[i]`` is as it was. Verified before it is delivered. Counts as a use for eviction.
        """

    async def longest_prefix(self, block_hashes: Sequence[bytes], timeout_s: float | None = None) -> int:
        """Return how many of the first blocks are in the store. Called before ``get``.

        A hint: they may be gone, or turn out corrupt, when they are read.
        """

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Delete these blocks; return how many there were. Called when a block turns out to be damaged."""

    async def clear(self) -> int:
        """Delete all blocks; return how many there were, if the backend knows. For ``kvrelay store clear``."""

    async def stats(self) -> StoreStats:
        """Return the content of the store, for ``kvrelay store stats``. May scan everything; do not poll it."""

    async def verify(self) -> VerifyReport:
        """Read everything and delete corrupt blocks, for ``kvrelay store verify``. No deadline.

        Raises StorageError if the backend cannot list what it holds.
        """

    async def close(self) -> None:
        """Release threads, files and connections within ``timeout_s``. Calls in progress end as misses. Idempotent."""
