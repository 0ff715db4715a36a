"""The KV pool as the kernels use it: the node's shared memory, or a copy of it on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch
from kvrelay.engine.kernels import LayerKV
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.ids import SequenceId

_HOST_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""How numpy holds each type; it has no bfloat16, and Paddle takes uint16 for it."""


class _SharedPool:
    """A pool in the node's shared memory. Nothing is copied."""

    def before_step(self, scheduled: Sequence[ScheduledSequence]) -> None:
        pass

    def after_layer(self, layer: int, batch: RaggedBatch) -> None:
        pass


class MappedPool(_SharedPool):
    """The memory's pages as Paddle tensors, for a CPU.

    Create only one per memory: two live Paddle tensors on one address abort the process.
    """

    def __init__(self, memory: KVMemory) -> None:
        planes = host_planes(memory)
        self.layers = [LayerKV(paddle.from_dlpack(keys), paddle.from_dlpack(values)) for keys, values in planes]


class AddressedPool(_SharedPool):
    """The memory's pages as addresses. They are valid until the memory is closed."""

    def __init__(self, memory: KVMemory) -> None:
        planes = memory.planes
        self.layers = [
            LayerKV(planes[layer, 0].ctypes.data, planes[layer, 1].ctypes.data) for layer in range(len(planes))
        ]


class _Resident(NamedTuple):
    """Content of a device block: the first ``num_tokens`` tokens of block number ``position`` of a sequence."""

    sequence: SequenceId
    position: int
    num_tokens: int


class StagedPool:
    """A copy of the memory on the device Paddle computes on.

    New KV is copied to the memory layer by layer, before it is announced. Context that this pool did not see being
    computed for the same sequence came from elsewhere (a transfer, a storage, another request's prefix) and is copied
    from the memory first. The copying is tested on a CPU; it has not been run on a GPU.
    """

    def __init__(self, memory: KVMemory) -> None:
        self._host = host_planes(memory)
        self._block_size = memory.geometry.block_size
        self._resident: dict[int, _Resident] = {}
        shape, dtype = list(self._host[0].keys.shape), memory.geometry.dtype
        self.layers = [LayerKV(paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)) for _ in self._host]

    def before_step(self, scheduled: Sequence[ScheduledSequence]) -> None:
        missing = [block for item in scheduled for block in self._missing(item)]
        # An exception in between leaves nothing noted that is not there: the step may be run again.
        if missing:
            offsets = np.arange(self._block_size)
            slots = (np.array(missing)[:, None] * self._block_size + offsets).reshape(-1)
            for device, host in zip(self.layers, self._host, strict=True):
                _copy_in(device.keys, host.keys, slots)
                _copy_in(device.values, host.values, slots)
        for item in scheduled:
            self._note(item)

    def after_layer(self, layer: int, batch: RaggedBatch) -> None:
        slots = paddle.to_tensor(batch.slot_mapping)
        for device, host in zip(self.layers[layer], self._host[layer], strict=True):
            host[batch.slot_mapping] = paddle.gather(device, slots).numpy()

    def _missing(self, item: ScheduledSequence) -> list[int]:
        """Return the blocks of context that the device lacks."""
        missing: list[int] = []
        end = item.start + item.num_tokens
        for index, block in enumerate(item.sequence.block_table[: -(-end // self._block_size)]):
            first = index * self._block_size
            needed = min(item.writes_from - first, self._block_size)
            has = self._resident.get(block)
            known = has is not None and has[:2] == (item.sequence.id, index) and has.num_tokens >= needed
            if needed > 0 and not known:
                missing.append(block)
        return missing

    def _note(self, item: ScheduledSequence) -> None:
        """Record that the device has all blocks of ``item`` after this step."""
        end = item.start + item.num_tokens
        for index, block in enumerate(item.sequence.block_table[: -(-end // self._block_size)]):
            filled = min(end - index * self._block_size, self._block_size)
            self._resident[block] = _Resident(item.sequence.id, index, filled)


def host_planes(memory: KVMemory) -> list[LayerKV]:
    """Return keys and values of each layer of ``memory`` as numpy arrays by slot, without a copy."""
    geometry = memory.geometry
    shape = (memory.num_blocks * geometry.block_size, geometry.num_kv_heads, geometry.head_dim)
    dtype = _HOST_DTYPES[geometry.dtype]

    def plane(layer: int, kv: int) -> npt.NDArray[np.generic]:
        typed: npt.NDArray[np.generic] = memory.planes[layer, kv].view(dtype)
        return typed.reshape(shape)

    return [LayerKV(plane(layer, 0), plane(layer, 1)) for layer in range(geometry.num_layers)]


def _copy_in(device: paddle.Tensor, host: npt.NDArray[np.generic], slots: npt.NDArray[np.int64]) -> None:
    paddle.scatter_(device, paddle.to_tensor(slots), paddle.to_tensor(host[slots]))
