"""A put or get in progress, for the backend's threads.

The caller lends its arrays for the call. A thread accesses them only inside ``pack`` and ``deliver``, which copy one
block and cannot hang. I/O uses the backend's own memory. A call can therefore end at its deadline while a disk or a
peer still holds a thread, and the caller's memory is not accessed afterwards. The copy is cheap: the bytes are in the
CPU's cache from the digest, and I/O on contiguous memory is faster.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

import numpy as np

from kvrelay.errors import LocalProtocolError
from kvrelay.protocol.block_hash import HASH_BYTES
from kvstore.storage.block_format import BlockFormat, Value
from kvstore.storage.interface import BlockView, PutOutcome


class Delivery(Enum):
    """Outcome of a value that a backend read."""

    DONE = auto()
    BAD = auto()
    """The value is damaged."""
    LATE = auto()
    """The call has ended."""


class Loan:
    """Guards access to borrowed memory. Created on the loop."""

    def __init__(self) -> None:
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._mutex = threading.Lock()
        self._num_users = 0
        self._returned = asyncio.Event()

    @contextmanager
    def use(self) -> Iterator[bool]:
        """``with loan.use() as lent:`` access the memory only if ``lent``. Called from any thread."""
        with self._mutex:
            lent = not self.ended
            self._num_users += lent
        try:
            yield lent
        finally:
            if lent:
                self._give_back()

    def _give_back(self) -> None:
        with self._mutex:
            self._num_users -= 1
            awaited = self.ended and not self._num_users
        if awaited:
            self._loop.call_soon_threadsafe(self._returned.set)

    async def end(self) -> None:
        """End the loan: wait for running copies, and allow no further ones."""
        with self._mutex:
            self.ended = True
            in_use = self._num_users > 0
        if in_use:
            await self._returned.wait()


class PutCall:
    """A put in progress."""

    def __init__(self, block_format: BlockFormat, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> None:
        _require_fit(block_format, block_hashes, blocks)
        self.block_hashes = block_hashes
        self.outcomes = [PutOutcome.FAILED] * len(block_hashes)
        self.loan = Loan()
        self._format = block_format
        self._blocks = blocks

    def pack(self, index: int, value: Value) -> bool:
        """Fill ``value`` with the stored form of block ``index``; False if the call ended. Called from any thread."""
        with self.loan.use() as lent:
            if lent:
                self._format.payload(value)[...] = self._blocks[index]
        if lent:
            self._format.seal(value, self.block_hashes[index])
        return lent

    def part(self, indices: Sequence[int]) -> PutCall:
        """Return a call for the blocks at ``indices`` only. It shares this call's loan."""
        part = PutCall(self._format, [self.block_hashes[i] for i in indices], [self._blocks[i] for i in indices])
        part.loan = self.loan
        return part


class GetCall:
    """A get in progress."""

    def __init__(self, block_format: BlockFormat, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> None:
        _require_fit(block_format, block_hashes, blocks)
        self.block_hashes = block_hashes
        self.hits = [False] * len(block_hashes)
        self.loan = Loan()
        self._format = block_format
        self._blocks = blocks

    def deliver(self, index: int, value: Value) -> Delivery:
        """Check ``value`` and copy its KV to the caller's block ``index``. Called from any thread."""
        if not self._format.is_good(value, self.block_hashes[index]):
            return Delivery.BAD
        with self.loan.use() as lent:
            if not lent:
                return Delivery.LATE
            self._blocks[index][...] = self._format.payload(value)
            self.hits[index] = True
        return Delivery.DONE

    def part(self, indices: Sequence[int]) -> GetCall:
        """Return a call for the blocks at ``indices`` only. It shares this call's loan."""
        part = GetCall(self._format, [self.block_hashes[i] for i in indices], [self._blocks[i] for i in indices])
        part.loan = self.loan
        return part


def require_hashes(block_hashes: Sequence[bytes]) -> None:
    """Raise LocalProtocolError unless all items are block hashes."""
    for block_hash in block_hashes:
        if len(block_hash) != HASH_BYTES:
            raise LocalProtocolError(f"a block hash has {HASH_BYTES} bytes, not {len(block_hash)}")


def _require_fit(block_format: BlockFormat, block_hashes: Sequence[bytes], blocks: Sequence[BlockView]) -> None:
    require_hashes(block_hashes)
    if len(block_hashes) != len(blocks):
        raise LocalProtocolError(f"{len(block_hashes)} block hashes for {len(blocks)} blocks")
    for block in blocks:
        if block.shape != block_format.block_shape or block.dtype != np.uint8:
            raise LocalProtocolError(
                f"a block is {block_format.block_shape} of uint8 here, not {block.shape} of {block.dtype}"
            )
