"""How a process tells others of its KV memory; apart from the memory itself, because the router needs no numpy."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class KVMemoryHandle(msgspec.Struct, frozen=True, tag="host"):
    """How another process finds a KV pool in host memory. Only good on the host it was made on."""

    pid: int
    fd: int
    tag: str
    num_blocks: int


class KVDeviceHandle(msgspec.Struct, frozen=True, tag="device"):
    """How another process finds a KV pool on a device. Only good on the host it was made on.

    ``pid``, ``fd`` and ``tag`` are those of the table of its blocks' digests, in host memory. ``memory`` is what
    processes that use the same ``kind`` of device need to reach the blocks: for CUDA the driver's IPC handle.
    """

    pid: int
    fd: int
    tag: str
    num_blocks: int
    kind: Literal["cuda", "simulated"]
    memory: bytes


KVHandle: TypeAlias = KVMemoryHandle | KVDeviceHandle
"""The handle of a pool, by the kind of its memory."""
