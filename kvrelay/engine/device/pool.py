"""The KV pool as the device's kernels see it, and when the layers of a step are announced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from kvrelay.engine.device.framework import Event, Framework, Stream, Tensor
from kvrelay.engine.device.sequence_rows import Int32
from kvrelay.engine.kernels import LayerKV
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.ids import BlockId

LAYERS_PER_EVENT = 4
"""Most layers that are announced at once: fewer events and digests, while later layers are computed."""


def announced_after(num_layers: int) -> list[int]:
    """Return after how many layers of a step those since the last time are announced.

    The last groups are smaller, so that after the last layer little is left to digest and to send.
    """
    ends = list(range(LAYERS_PER_EVENT, num_layers, LAYERS_PER_EVENT))
    while (left := num_layers - (ends[-1] if ends else 0)) > 0:
        ends.append(num_layers - left // 2)
    return ends


class LayersReady(Protocol):
    """When the KV of some layers is where others read it."""

    def synchronize(self) -> None:
        """Wait until it is."""


Announce: TypeAlias = Callable[[range, LayersReady], None]
"""Told layers of a step, in order, and when their KV is where others read it."""


class LayerEvents:
    """Announces the layers of one step while they are launched, a few at a time.

    ``mark(layers)`` returns when they are there.
    """

    def __init__(self, num_layers: int, mark: Callable[[range], LayersReady], announce: Announce) -> None:
        self._ends = announced_after(num_layers)
        self._mark = mark
        self._announce = announce
        self._next = 0

    def layer_launched(self, layer: int) -> None:
        """The device has been told to write ``layer``."""
        if layer + 1 in self._ends:
            self._announce_to(layer + 1)

    def all_launched(self) -> None:
        """The device has been told to write all layers."""
        self._announce_to(self._ends[-1])

    def _announce_to(self, end: int) -> None:
        layers, self._next = range(self._next, end), end
        if layers:
            self._announce(layers, self._mark(layers))


class DevicePool:
    """A pool whose layers are there when they are computed: the node's memory itself, or memory of the device.

    With ``digests`` the blocks that a step writes are digested first, in a stream of the pool's own: this node sends
    them. Who waits for the layers starts their digest, because that would delay the launch of the later layers. The
    next step may run meanwhile, and write to a block that was not full; its own digest of that comes later.
    """

    def __init__(
        self, memory: KVMemory | DeviceMemory, framework: Framework, stream: Stream, *, digests: bool = False
    ) -> None:
        self._framework, self._stream = framework, stream
        self._block_size = memory.geometry.block_size
        self._digested = memory if digests and isinstance(memory, DeviceMemory) else None
        words = framework.words(memory) if isinstance(memory, DeviceMemory) else framework.share(memory.planes)
        self.layers = _layers(framework, words, memory)

    def layer_events(self, slots: Int32, announce: Announce) -> LayerEvents:
        """Return what announces the layers of a step that writes to ``slots``; those below 0 are none."""
        memory, written = self._digested, slots[slots >= 0]
        if memory is None or not len(written):
            return LayerEvents(len(self.layers), lambda _: self._now(), announce)
        blocks: list[BlockId] = np.unique(written // self._block_size).tolist()

        return LayerEvents(
            len(self.layers), lambda layers: _Digests(memory, layers, blocks, after=self._now()), announce
        )

    def _now(self) -> Event:
        """Return the event of what the device has been told to compute so far."""
        event = self._framework.event()
        event.record(self._stream)
        return event

    def close(self) -> None:
        """Let go of the memory."""
        del self.layers


class _Digests:
    """Layers that are there when their digests are noted."""

    def __init__(self, memory: DeviceMemory, layers: range, blocks: list[BlockId], after: Event) -> None:
        self._memory, self._layers, self._blocks, self._after = memory, layers, blocks, after

    def synchronize(self) -> None:
        """See LayersReady."""
        self._memory.begin_digest(self._layers, self._blocks, after=self._after).wait()


def _layers(framework: Framework, tensor: Tensor, memory: KVMemory | DeviceMemory) -> list[LayerKV]:
    geometry = memory.geometry
    shape = (
        *(geometry.num_layers, 2, memory.num_blocks * geometry.block_size),
        *(geometry.num_kv_heads, geometry.head_dim),
    )
    planes = framework.typed(tensor, geometry.dtype, shape)
    return [LayerKV(planes[layer, 0], planes[layer, 1]) for layer in range(geometry.num_layers)]
