"""The interface of a KV store. Its users are the nodes' shells and the ``kvrelay store`` command.

A block is named by its block hash (``kvrelay.protocol.block_hash``) and holds the KV of all layers. Its bytes are in
the memory of the caller, ``[num_layers, 2, plane_block_bytes]`` uint8 with any strides, as ``KVPool.lend`` gives it.

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
    """Not stored: the store is full or unavailable, or the deadline passed."""


@dataclass(slots=True)
class StoreCounters:
    """Monotonic totals of one store object."""

    hit_blocks: int = 0
    missed_blocks: int = 0
    """Requested by ``get`` and not delivered, for any reason."""
    corrupt_blocks: int = 0
    """Found but damaged; deleted, and also counted as missed."""
    read_bytes: int = 0
    """KV bytes of the hits."""
    written_blocks: int = 0
    present_blocks: int = 0
    failed_blocks: int = 0
    written_bytes: int = 0
    """KV bytes of the written blocks."""
    evicted_blocks: int = 0
    """Evicted by this object. Not reported by backends whose server evicts."""
    timeouts: int = 0
    """Calls that reached their deadline."""
    errors: int = 0
    """Calls in which the backend failed."""
    skipped: int = 0
    """Calls not passed to the backend during the pause after a failure."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Content of a backend for this geometry, over all processes that use it.

    ``used_bytes`` and ``capacity_bytes`` include the backend's own overhead; ``None``: not reported by the backend.
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
    """Blocks by block hash, for one ``KVGeometry``. Blocks of other models and shapes are neither seen nor changed.

    All methods are called from one event loop, any number at a time, and never block it. ``put``, ``get``,
    ``longest_prefix`` and ``delete`` end within the configured ``timeout_s``, or the given one if shorter. Failures of
    the backend do not raise: they are misses or failed puts, and are counted. Invalid arguments raise
    LocalProtocolError. The other methods are for operators and raise StorageUnavailableError if the backend cannot be
    reached or does not answer in time.
    """

    @property
    def counters(self) -> StoreCounters:
        """The totals, for heartbeats and metrics. No I/O."""

    async def open(self) -> None:
        """Open the store. Called once by a node when it starts, before any other method.

        An unavailable server is not an error: the store misses until the server is reachable. Raises StorageError if
        the store can never work as configured; the store is then closed.
        """

    async def put(self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> list[PutOutcome]:
        """Store ``blocks[i]`` as ``block_hashes[i]``. Called on preemption and when a request has finished.

        Blocks already stored are not written again. Blocks are stored in order, so that at the deadline the beginning
        of the sequence is stored. May evict others.
        """

    async def get(
        self, block_hashes: Sequence[bytes], blocks: Sequence[BlockView], timeout_s: float | None = None
    ) -> list[bool]:
        """Read ``block_hashes[i]`` into ``blocks[i]``; True for each hit. Called on admission and on resume.

        On a miss ``blocks[i]`` is unchanged. Values are verified before they are delivered. A hit counts as a use for
        eviction.
        """

    async def longest_prefix(self, block_hashes: Sequence[bytes], timeout_s: float | None = None) -> int:
        """Return the number of leading blocks that are in the store. Called before ``get``.

        A hint: blocks may be evicted or found corrupt before they are read.
        """

    async def delete(self, block_hashes: Sequence[bytes]) -> int:
        """Delete these blocks; return the number deleted. Called when a block is found to be damaged."""

    async def clear(self) -> int:
        """Delete all blocks; return the number deleted, if the backend knows it. For ``kvrelay store clear``."""

    async def stats(self) -> StoreStats:
        """Return the content of the store, for ``kvrelay store stats``. May scan everything; do not poll it."""

    async def verify(self) -> VerifyReport:
        """Read everything and delete corrupt blocks, for ``kvrelay store verify``. No deadline.

        Raises StorageError if the backend cannot list its blocks.
        """

    async def close(self) -> None:
        """Release threads, files and connections within ``timeout_s``. Calls in progress end as misses. Idempotent."""
