"""The KV pool of a node as everybody sees it who does not own it: blocks of layers to read, write, copy and digest.

Where the bytes are, and how they are laid out there, is the affair of one implementation per kind of memory.
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
    """Blocks 0 to ``num_blocks - 1``. Block ids that are passed in must be among them, and different.

    Whoever calls this keeps the blocks (pins them) until the call, or the memory it returned, is done with. The payload
    of blocks is their bytes layer by layer, all K and then all V.
    """

    @property
    def geometry(self) -> KVGeometry:
        """The shape of a block."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""

    @property
    def handle(self) -> KVHandle:
        """What another process of this host needs to open the pool."""

    def read(self, layers: range, block_ids: list[BlockId]) -> list[memoryview]:
        """Return the payload of these blocks in parts, which may be views of the pool."""

    def digest(self, layers: range, block_ids: list[BlockId]) -> int:
        """Return a digest of the payload, equal for equal payloads in pools of the same kind of memory.

        It may have been made when the blocks were written.
        """

    def write(self, layers: range, block_ids: list[BlockId], payload: Sequence[memoryview]) -> None:
        """Put a payload, cut anywhere, into these blocks."""

    def copy_from(self, source: KVPool, layers: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> int:
        """Copy block ``source_ids[i]`` of ``source`` to ``target_ids[i]``; return the digest of what was copied.

        Raises GeometryMismatchError if the memory of ``source`` is of a kind that cannot be copied from.
        """

    def copy_out(self, block_ids: Sequence[BlockId], into: Sequence[HostBlock]) -> None:
        """Copy block ``block_ids[i]`` to ``into[i]``."""

    def lend(self, block_ids: Sequence[BlockId]) -> AbstractContextManager[list[HostBlock]]:
        """Return host memory for these blocks, to be filled: what is in it at the end is what the blocks hold."""

    def close(self) -> None:
        """Give the memory back. It is gone when the last process that has it open has done so."""


def has_blocks(pool: KVPool, block_ids: list[BlockId]) -> bool:
    """Tell whether ``pool`` has all of ``block_ids``."""
    return not block_ids or (min(block_ids) >= 0 and max(block_ids) < pool.num_blocks)
