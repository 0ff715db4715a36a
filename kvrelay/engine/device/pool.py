"""The KV pool as the device's kernels see it, and when the layers of a step are announced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvrelay.engine.device.framework import Event, Framework, Stream, Tensor
from kvrelay.engine.device.sequence_rows import Int32
from kvrelay.engine.kernels import LayerKV
from kvrelay.kv_pool.device_memory import BlockCopy, DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.ids import BlockId

LAYERS_PER_DIGEST = 4
"""Layers that are digested and announced together: fewer launches and frames, while later layers are computed."""


class HostPool:
    """The node's memory itself, where a CPU computes."""

    def __init__(self, memory: KVMemory, framework: Framework) -> None:
        self.layers = _layers(framework, framework.share(memory.planes), memory)

    def begin_step(self, slots: Int32, on_layer: Callable[[int], None]) -> LayersInOrder:
        """Return what announces the layers of a step that writes to ``slots``; those below 0 are none."""
        return LayersInOrder(len(self.layers), on_layer)

    def close(self) -> None:
        """Let go of the memory."""
        del self.layers


class LayersInOrder:
    """Announces each layer of one step as soon as it is launched: it is done by then."""

    def __init__(self, num_layers: int, on_layer: Callable[[int], None]) -> None:
        self._num_layers = num_layers
        self._on_layer = on_layer
        self._told = 0

    def layer_launched(self, layer: int) -> None:
        """The device has been told to write ``layer``."""
        self._tell(layer + 1)

    def finish(self) -> None:
        """Announce the layers that are left, when they are in the memory."""
        self._tell(self._num_layers)

    def _tell(self, end: int) -> None:
        while self._told < end:
            self._on_layer(self._told)
            self._told += 1


class DevicePool:
    """Memory of the device that messagers open. ``stream`` is where steps are computed.

    With ``digests`` the blocks that a step writes are digested, a few layers at a time, before they are announced.
    Otherwise this node sends no KV, and nobody waits for a single layer.
    """

    def __init__(self, memory: DeviceMemory, framework: Framework, stream: Stream, *, digests: bool) -> None:
        self.layers = _layers(framework, framework.words(memory), memory)
        self._memory, self._stream, self._digests = memory, stream, digests
        self._written = [framework.event() for _ in self.layers]

    def begin_step(self, slots: Int32, on_layer: Callable[[int], None]) -> LayersInOrder:
        """See HostPool."""
        if self._digests and (slots >= 0).any():
            blocks = np.unique(slots[slots >= 0] // self._memory.geometry.block_size)
            return LayersDigested(self, blocks.tolist(), on_layer)
        return LayersAtTheEnd(self, on_layer)

    def begin_digest(self, layers: range, blocks: list[BlockId]) -> BlockCopy:
        """Digest ``blocks`` as they are after what the device has been told to compute so far."""
        return self._memory.begin_digest(layers, blocks, after=self.mark(layers.start))

    def mark(self, layer: int) -> Event:
        """Return the event of what the device has been told to compute so far; ``layer`` is that of its last use."""
        event = self._written[layer]
        event.record(self._stream)
        return event

    def close(self) -> None:
        """Let go of the memory."""
        del self.layers


class LayersAtTheEnd(LayersInOrder):
    """Announces all layers when the device has computed them."""

    def __init__(self, pool: DevicePool, on_layer: Callable[[int], None]) -> None:
        super().__init__(len(pool.layers), on_layer)
        self._pool = pool

    def layer_launched(self, layer: int) -> None:
        """See LayersInOrder."""

    def finish(self) -> None:
        self._pool.mark(0).synchronize()
        super().finish()


class LayersDigested(LayersInOrder):
    """Digests the blocks of one step, a few layers at a time, and announces layers that are digested."""

    def __init__(self, pool: DevicePool, blocks: list[BlockId], on_layer: Callable[[int], None]) -> None:
        super().__init__(len(pool.layers), on_layer)
        self._pool = pool
        self._blocks = blocks
        self._begun: list[tuple[int, BlockCopy]] = []
        self._next = 0

    def layer_launched(self, layer: int) -> None:
        if (layer + 1) % LAYERS_PER_DIGEST == 0:
            self._begin(layer + 1)
        while self._begun and self._begun[0][1].is_done:
            self._end()

    def finish(self) -> None:
        """See LayersInOrder. Layers that were not launched one by one are digested at once."""
        self._begin(self._num_layers)
        while self._begun:
            self._end()

    def _begin(self, end: int) -> None:
        layers, self._next = range(self._next, end), end
        if layers:
            self._begun.append((end, self._pool.begin_digest(layers, self._blocks)))

    def _end(self) -> None:
        end, digests = self._begun.pop(0)
        digests.wait()
        self._tell(end)


def _layers(framework: Framework, tensor: Tensor, memory: KVMemory | DeviceMemory) -> list[LayerKV]:
    geometry = memory.geometry
    shape = (
        *(geometry.num_layers, 2, memory.num_blocks * geometry.block_size),
        *(geometry.num_kv_heads, geometry.head_dim),
    )
    planes = framework.typed(tensor, geometry.dtype, shape)
    return [LayerKV(planes[layer, 0], planes[layer, 1]) for layer in range(geometry.num_layers)]
