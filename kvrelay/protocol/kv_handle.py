"""Handles of KV pools. A separate module from the pools, because the router does not import numpy."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class KVMemoryHandle(msgspec.Struct, frozen=True, tag="host"):
    """The handle of a KV pool in host memory. Valid only on its host."""

    pid: int
    fd: int
    tag: str
    num_blocks: int


KVHandle: TypeAlias = KVMemoryHandle
"""The handle of a pool; one type per kind of memory."""
