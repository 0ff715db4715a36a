"""The KV pool on the device, and its mirror: the node's shared memory, which messagers and stores read and write.

For now everything that the device writes is copied to that memory before it is announced, and what others wrote there
is copied to the device before a step reads it. A CPU computes in the shared memory itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from kvrelay.engine.device.framework import Event, Framework, Stream, Tensor
from kvrelay.engine.device.operations import Operations
from kvrelay.engine.device.step_slot import StepSlot, UploadArena
from kvrelay.engine.kernels import LayerKV
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.ids import BlockId

LAYERS_PER_EVENT = 4
"""Layers that are announced at once: fewer events and copies, while later layers are computed."""

Announce: TypeAlias = Callable[[range, Event], None]
"""Told layers of a step, in order, and the event after which their KV is where others read it."""


class LayerEvents:
    """Announces the layers of one step while they are launched, a few at a time.

    ``mark(layers)`` returns the event after which they are there.
    """

    def __init__(self, num_layers: int, mark: Callable[[range], Event], announce: Announce) -> None:
        self._num_layers = num_layers
        self._mark = mark
        self._announce = announce
        self._next = 0

    def layer_launched(self, layer: int) -> None:
        """The device has been told to write ``layer``."""
        if (layer + 1) % LAYERS_PER_EVENT == 0:
            self._announce_to(layer + 1)

    def all_launched(self) -> None:
        """The device has been told to write all layers."""
        self._announce_to(self._num_layers)

    def _announce_to(self, end: int) -> None:
        layers, self._next = range(self._next, end), end
        if layers:
            self._announce(layers, self._mark(layers))


class PlainPool:
    """A pool without copies: the node's memory, or device memory that no other process reads."""

    def __init__(self, tensor: Tensor, memory: KVMemory, framework: Framework, stream: Stream) -> None:
        self._framework, self._stream = framework, stream
        self.layers = _layers(framework, tensor, memory)

    def copy_in(self, blocks: list[BlockId], arena: UploadArena) -> None:
        """Make ``blocks``, which others wrote, visible to the kernels of steps launched from now on."""

    def layer_events(self, slots: Tensor, room: StepSlot, announce: Announce) -> LayerEvents:
        """Return what announces the layers of the step in ``room``, which writes to ``slots``, on the device."""
        return LayerEvents(len(self.layers), self._mark, announce)

    def _mark(self, layers: range) -> Event:
        event = self._framework.event()
        event.record(self._stream)
        return event

    def close(self) -> None:
        """Let go of the memory."""
        del self.layers


class MirroredPool:
    """A pool on the device with the node's memory as its mirror, copied by kernels on a stream of their own.

    The copies of a step may run when the next one is launched, into the same step buffer: so they have slots of their
    own.
    """

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

    def copy_in(self, blocks: list[BlockId], arena: UploadArena) -> None:
        """See PlainPool."""
        if blocks:
            device_blocks = arena.upload(np.array(blocks, np.int32))
            planes = range(2 * self._num_layers)
            self._operations.copy_blocks(self._host_words, self._device_words, device_blocks, planes)

    def layer_events(self, slots: Tensor, room: StepSlot, announce: Announce) -> LayerEvents:
        """See PlainPool."""
        kept = room.keep(slots)

        def copy(layers: range) -> Event:
            return self._copy_out(kept, layers)

        return LayerEvents(self._num_layers, copy, announce)

    def _copy_out(self, slots: Tensor, layers: range) -> Event:
        """Copy ``slots`` of ``layers`` when what the compute stream has been told to do so far is done."""
        written, copied = self._framework.event(), self._framework.event()
        written.record(self._compute)
        self._stream.wait_event(written)
        with self._framework.on(self._stream):
            planes = range(2 * layers.start, 2 * layers.stop)
            self._operations.copy_blocks(*self._by_slot, slots, planes)
        copied.record(self._stream)
        return copied

    def close(self) -> None:
        """Let go of the memory."""
        self._framework.unshare(self._memory.planes)
        del self._host, self._host_words, self._device_words, self._by_slot, self.layers


DevicePool = PlainPool | MirroredPool


def shared_pool(memory: KVMemory, framework: Framework, stream: Stream) -> PlainPool:
    """Return the pool that is ``memory`` itself, for a CPU."""
    return PlainPool(framework.share(memory.planes), memory, framework, stream)


def private_pool(memory: KVMemory, framework: Framework, stream: Stream) -> PlainPool:
    """Return a pool of the size of ``memory`` that only this engine reads and writes."""
    geometry = memory.geometry
    words = memory.num_blocks * geometry.block_bytes // 4
    return PlainPool(framework.zeros((words,), "int32"), memory, framework, stream)


def _layers(framework: Framework, tensor: Tensor, memory: KVMemory) -> list[LayerKV]:
    geometry = memory.geometry
    shape = (
        *(geometry.num_layers, 2, memory.num_blocks * geometry.block_size),
        *(geometry.num_kv_heads, geometry.head_dim),
    )
    planes = framework.typed(tensor, geometry.dtype, shape)
    return [LayerKV(planes[layer, 0], planes[layer, 1]) for layer in range(geometry.num_layers)]
