"""Opens the KV pool of another process by its handle."""

from __future__ import annotations

from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.kv_handle import KVHandle


def open_pool(geometry: KVGeometry, handle: KVHandle) -> KVPool:
    """Open a pool that another process of this host created.

    Raises PeerLostError if that process is gone or out of reach, GeometryMismatchError if the memory is not of the size
    that ``geometry`` and ``handle`` say.
    """
    return KVMemory.attach(geometry, handle)
