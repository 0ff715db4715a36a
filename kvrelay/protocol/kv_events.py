"""KV events: how a node's prefix cache changes, in the format in which vLLM publishes it.

Consumers of vLLM's KV events read them unchanged. Encoded with MessagePack, an event is ``[kind, field, ...]`` and a
batch ``[time, events, rank]``. A block hash is the number that the first bytes of kvrelay's block hash make, most
significant first (``kvrelay.protocol.block_hash.PREFIX_KEY_BYTES``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES

POOL_MEDIUM = "GPU"
"""vLLM's name for the KV pool that the engine computes in, on whatever device it is."""


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """``block_hashes`` can be matched from now on, each the continuation of the one before, the first of
    ``parent_block_hash`` (None: a prompt begins there). ``token_ids`` are ``block_size`` for each."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = POOL_MEDIUM
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """``block_hashes`` cannot be matched any more."""

    block_hashes: list[int]
    medium: str | None = POOL_MEDIUM


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nothing can be matched."""


KVEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events in their order, at ``ts``, in seconds since 1970. ``data_parallel_rank``: kvrelay has one rank."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int = 0


def event_hashes(hashes: Iterable[bytes]) -> list[int]:
    """Return block hashes as events have them."""
    return [int.from_bytes(block_hash[:PREFIX_KEY_BYTES], "big") for block_hash in hashes]
