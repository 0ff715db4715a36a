"""How a process tells others of its KV memory; apart from ``kv_memory``, because the router needs no numpy."""

from __future__ import annotations

import msgspec


class KVMemoryHandle(msgspec.Struct, frozen=True):
    """How another process finds a node's KV memory. Only good on the host it was made on."""

    pid: int
    fd: int
    tag: str
    num_blocks: int
