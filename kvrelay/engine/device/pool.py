"""The KV pool on the device, and its mirror: the node's shared memory, which messagers and stores read and write.

For now everything that the device writes is copied to that memory before it is announced, and what others wrote there
is copied to the device before a step reads it. A CPU computes in the shared memory itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvrelay.engine.device.framework import Framework, Stream, Tensor
from kvrelay.engine.device.operations import Operations
from kvrelay.engine.kernels import LayerKV
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.ids import BlockId

LAYERS_PER_COPY = 4
"""Layers that one copy to the mirror takes: fewer launches, while later layers are computed."""


class PlainPool:
    """A pool without copies: the node's memory, or device memory that no other process reads."""

    def __init__(self, tensor: Tensor, memory: KVMemory, framework: Framework) -> None:
        self.layers = _layers(framework, tensor, memory)

    def copy_in(self, blocks: list[BlockId]) -> None:
        """Make ``blocks``, which others wrote, visible to the kernels."""

    def begin_copy_out(self, slots: Tensor, on_layer: Callable[[int], None]) -> LayerCopies:
        """Return what announces the layers of a step that writes to ``slots``, on the device."""
        return LayerCopies(len(self.layers), on_layer)

    def close(self) -> None:
        """Let go of the memory."""
        del self.layers


class LayerCopies:
    """Announces each layer of one step when its keys and values are in the node's memory."""

    def __init__(self, num_layers: int, on_layer: Callable[[int], None]) -> None:
        self._num_layers = num_layers
        self._on_layer = on_layer
        self._told = 0

    def layer_launched(self, layer: int) -> None:
        """The device has been told to write ``layer``; on a CPU it has done so."""
        self._tell(layer + 1)

    def finish(self) -> None:
        """Announce the layers that are left, when they are there."""
        self._tell(self._num_layers)

    def _tell(self, end: int) -> None:
        while self._told < end:
            self._on_layer(self._told)
            self._told += 1


class MirroredPool:
    """A pool on the device with the node's memory as its mirror, copied by kernels on a stream of their own."""

    def __init__(self, memory: KVMemory, framework: Framework, operations: Operations, stream: Stream) -> None:
        geometry = memory.geometry
        self._memory, self._framework, self._operations = memory, framework, operations
        self._compute, self._stream = stream, framework.stream()
        self._num_layers = geometry.num_layers
        shape = (2 * geometry.num_layers, memory.num_blocks, geometry.plane_block_bytes // 4)
        self._host = framework.share(memory.planes)
        self._host_words = framework.typed(self._host, "int32", shape)
        self._device_words = framework.zeros(shape, "int32")
        by_slot = (shape[0], memory.num_blocks * geometry.block_size, -1)
        self._by_slot = self._device_words.view(by_slot), self._host_words.view(by_slot)
        self.layers = _layers(framework, self._device_words, memory)
        self._written = [framework.event() for _ in range(geometry.num_layers)]
        self._copied = [framework.event() for _ in range(geometry.num_layers)]

    def copy_in(self, blocks: list[BlockId]) -> None:
        if blocks:
            device_blocks = self._framework.upload(np.array(blocks, np.int32), "int32")
            planes = range(2 * self._num_layers)
            self._operations.copy_blocks(self._host_words, self._device_words, device_blocks, planes)

    def begin_copy_out(self, slots: Tensor, on_layer: Callable[[int], None]) -> MirrorCopies:
        return MirrorCopies(self, slots, on_layer)

    def copy_out(self, slots: Tensor, layers: range) -> None:
        """Copy ``slots`` of ``layers`` when what the compute stream has been told to do so far is done."""
        event = self._written[layers.start]
        event.record(self._compute)
        self._stream.wait_event(event)
        with self._framework.on(self._stream):
            planes = range(2 * layers.start, 2 * layers.stop)
            self._operations.copy_blocks(*self._by_slot, slots, planes)
            self._copied[layers.start].record(self._stream)

    def is_copied(self, layers: range, wait: bool) -> bool:
        """Return whether the copy of ``layers`` is over, after it is if ``wait``."""
        event = self._copied[layers.start]
        if wait:
            event.synchronize()
        return wait or event.query()

    def close(self) -> None:
        """Let go of the memory."""
        self._framework.unshare(self._memory.planes)
        del self._host, self._host_words, self._device_words, self._by_slot, self.layers


class MirrorCopies(LayerCopies):
    """The copies of one step to the mirror, a few layers at a time."""

    def __init__(self, pool: MirroredPool, slots: Tensor, on_layer: Callable[[int], None]) -> None:
        super().__init__(len(pool.layers), on_layer)
        self._pool = pool
        self._slots = slots
        self._begun: list[range] = []
        self._next = 0

    def layer_launched(self, layer: int) -> None:
        if (layer + 1) % LAYERS_PER_COPY == 0:
            self._begin(layer + 1)
        self._tell_copied(wait=False)

    def finish(self) -> None:
        self._begin(self._num_layers)
        self._tell_copied(wait=True)

    def _begin(self, end: int) -> None:
        layers, self._next = range(self._next, end), end
        if layers:
            self._pool.copy_out(self._slots, layers)
            self._begun.append(layers)

    def _tell_copied(self, wait: bool) -> None:
        while self._begun and self._pool.is_copied(self._begun[0], wait):
            self._tell(self._begun.pop(0).stop)


DevicePool = PlainPool | MirroredPool


def shared_pool(memory: KVMemory, framework: Framework) -> PlainPool:
    """Return the pool that is ``memory`` itself, for a CPU."""
    return PlainPool(framework.share(memory.planes), memory, framework)


def private_pool(memory: KVMemory, framework: Framework) -> PlainPool:
    """Return a pool of the size of ``memory`` that only this engine reads and writes."""
    geometry = memory.geometry
    words = memory.num_blocks * geometry.block_bytes // 4
    return PlainPool(framework.zeros((words,), "int32"), memory, framework)


def _layers(framework: Framework, tensor: Tensor, memory: KVMemory) -> list[LayerKV]:
    geometry = memory.geometry
    shape = (
        *(geometry.num_layers, 2, memory.num_blocks * geometry.block_size),
        *(geometry.num_kv_heads, geometry.head_dim),
    )
    planes = framework.typed(tensor, geometry.dtype, shape)
    return [LayerKV(planes[layer, 0], planes[layer, 1]) for layer in range(geometry.num_layers)]
