"""How a process tells others of its KV memory; apart from the memory itself, because the router needs no numpy."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class KVMemoryHandle(msgspec.Struct, frozen=True, tag="host"):
    """How another process finds a KV pool in host memory. Only good on the host it was made on."""

    pid: int
    fd: int
    tag: str
    num_blocks: int


KVHandle: TypeAlias = KVMemoryHandle
"""The handle of a pool, by the kind of its memory."""
