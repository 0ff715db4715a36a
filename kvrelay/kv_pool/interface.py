"""The interface of a node's KV pool for all code but its owner: read, write, copy and digest blocks of layers.

There is one implementation per kind of memory. Only the implementation knows the memory layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId
from kvrelay.protocol.kv_handle import KVHandle

HostBlock: TypeAlias = npt.NDArray[np.uint8]
"""One block in host memory, ``[num_layers, 2, plane_block_bytes]`` with any strides."""


class KVPool(Protocol):
    """Blocks 0 to ``num_blocks - 1``. Block ids passed to a method must be in this range and distinct.

    The caller must pin the blocks until the call has returned and the returned memory is not used any more. The payload
    of blocks is their bytes layer by layer, all K and then all V.
    """

    @property
    def geometry(self) -> KVGeometry:
        """The shape of a block."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def handle(self) -> KVHandle:
        """The handle by which another process of this host opens the pool."""

    def read(self, layers: range, block_ids: list[BlockId]) -> list[memoryview]:
        """Return the payload of these blocks in parts, which may be views of the pool."""

    def gather(self, layers: range, block_ids: list[BlockId], into: memoryview) -> int:
        """Copy the payload of these blocks to ``into``, which has its size; return its ``digest``."""

    def digest(self, layers: range, block_ids: list[BlockId]) -> int:
        """Return a digest of the payload, equal for equal payloads in pools of the same kind of memory.

        It may have been made when the blocks were written.
        """

    def write(self, layers: range, block_ids: list[BlockId], payload: Sequence[memoryview]) -> None:
        """Write a payload, split at any positions, to these blocks."""

    def copy_from(self, source: KVPool, layers: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> int:
        """Copy block ``source_ids[i]`` of ``source`` to ``target_ids[i]``; return the digest of the payload.

        Raises GeometryMismatchError if the memory of ``source`` is of a kind that cannot be copied from.
        """

    def copy_out(self, block_ids: Sequence[BlockId], into: Sequence[HostBlock]) -> None:
        """Copy block ``block_ids[i]`` to ``into[i]``."""

    def lend(self, block_ids: Sequence[BlockId]) -> AbstractContextManager[list[HostBlock]]:
        """Return a context with host memory to fill. At its end the blocks contain the content of that memory."""

    def close(self) -> None:
        """Release the memory. It is freed when the last process that has it open releases it."""


def has_blocks(pool: KVPool, block_ids: list[BlockId]) -> bool:
    """Return whether ``pool`` has all of ``block_ids``."""
    return not block_ids or (min(block_ids) >= 0 and max(block_ids) < pool.num_blocks)
