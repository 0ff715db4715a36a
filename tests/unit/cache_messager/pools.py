"""KV pools for tests of messagers, on the host and on a simulated device, with the same access to their bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId

Bytes = npt.NDArray[np.uint8]


class SimulatedMemory(DeviceMemory):
    """A pool on a simulated device; ``planes`` as in KVMemory. What a test writes there it digests with ``wrote``."""

    @property
    def planes(self) -> Bytes:
        words: npt.NDArray[np.int64] = self.blocks.words
        return words.view(np.uint8).reshape(self.geometry.num_layers, 2, self.num_blocks, -1)


Pool = KVMemory | SimulatedMemory


def make_pool(geometry: KVGeometry, num_blocks: int, *, on_device: bool) -> Pool:
    if not on_device:
        return KVMemory.create(geometry, num_blocks)
    return SimulatedMemory.create(geometry, num_blocks, "simulated")


def wrote(pool: Pool, block_ids: list[BlockId] | None = None) -> None:
    """Do as an engine that has written these blocks, all by default."""
    if isinstance(pool, SimulatedMemory):
        blocks = [BlockId(block) for block in range(pool.num_blocks)] if block_ids is None else block_ids
        pool.begin_digest(range(pool.geometry.num_layers), blocks).wait()


def fastest(on_device: bool) -> str:
    """Return the link that copies from pool to pool."""
    return "cuda" if on_device else "shm"
