"""What a KV pool needs of the device its blocks are on: copies and digests of blocks, and a way to reach them.

``cuda_blocks`` is one implementation. ``simulated_blocks`` is host memory in place of a device, for tests and for
clusters that try the same code without a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

from kvrelay.kv_pool.block_digest import Words
from kvrelay.protocol.ids import BlockId


class BlockWork(Protocol):
    """A copy or a digest that the device has been told to do."""

    @property
    def is_done(self) -> bool:
        """Whether ``wait`` is known to return at once."""

    def wait(self) -> Words:
        """Return the digests int64 [planes, blocks] of what was read, when it is done; from any thread.

        Raises DeviceError if the device could not do it.
        """


class DeviceBlocks(Protocol):
    """``[planes, num_blocks, words]`` of int64 on a device: planes are K and V of layer 0, K and V of layer 1 ...

    What raises DeviceError has found the device, or this process's use of it, broken for good.
    """

    memory: bytes
    """What another process needs to open them (``KVDeviceHandle.memory``)."""

    def begin_copy(self, source: Any, planes: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> BlockWork:
        """Copy block ``source_ids[i]`` of ``source``, of the same kind, to ``target_ids[i]``. Raises DeviceError."""

    def begin_digest(self, planes: range, block_ids: list[BlockId], after: Any = None) -> BlockWork:
        """Digest blocks as they are when the device is past the event ``after``. Raises DeviceError."""

    def read(self, planes: range, block_ids: list[BlockId]) -> Words:
        """Return a copy of blocks in host memory: [planes, blocks, words]. Raises DeviceError."""

    def write(self, planes: range, block_ids: list[BlockId], words: Words) -> Words:
        """Put ``words`` [planes, blocks, words] into blocks; return the digests that the device made of them.

        Raises DeviceError.
        """

    def close(self) -> None:
        """Give the memory back, or let go of another process's; nothing is under way."""
