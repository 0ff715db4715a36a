"""Handles of KV pools. A separate module from the pools, because the router does not import numpy."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class KVMemoryHandle(msgspec.Struct, frozen=True, tag="host"):
    """The handle of a KV pool in host memory. Valid only on its host."""

    pid: int
    fd: int
    tag: str
    num_blocks: int


class KVDeviceHandle(msgspec.Struct, frozen=True, tag="device"):
    """The handle of a KV pool on a device. Valid only on its host.

    ``pid``, ``fd`` and ``tag`` are those of the table of its blocks' digests, in host memory. ``memory`` is what
    processes that use the same ``kind`` of device need to reach the blocks: for CUDA the driver's IPC handle.
    ``framework``: what the owner and its messager use CUDA with. Other nodes may use another one.
    """

    pid: int
    fd: int
    tag: str
    num_blocks: int
    kind: Literal["cuda", "simulated"]
    memory: bytes
    framework: Literal["torch", "paddle"] = "torch"


KVHandle: TypeAlias = KVMemoryHandle | KVDeviceHandle
"""The handle of a pool; one type per kind of memory."""
