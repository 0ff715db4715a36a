"""The KV geometry: what must be equal on two nodes before one may write to the other's KV cache."""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 2
"""Raised when the meaning of a message changes. Appended fields do not raise it (docs/compatibility.md)."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
"""Bytes per element of each dtype a KV cache can have."""


class KVGeometry(msgspec.Struct, frozen=True):
    """Shape and type of a KV cache: per layer, K and V each ``[num_blocks, block_size, num_kv_heads, head_dim]``.

    The number of blocks may differ between nodes and is not part of it.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    model_digest: str
    layout: str = "NHD"
    protocol_version: int = PROTOCOL_VERSION

    @property
    def plane_block_bytes(self) -> int:
        """Bytes of one block in one plane, i.e. of its K or its V in one layer."""
        return self.block_size * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V together."""
        return 2 * self.plane_block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.layer_block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def differences(self, other: KVGeometry) -> list[str]:
        """Return one line ``field: ours != theirs`` for each field in which ``other`` differs."""
        pairs = ((field, getattr(self, field), getattr(other, field)) for field in self.__struct_fields__)
        return [f"{field}: {ours!r} != {theirs!r}" for field, ours, theirs in pairs if ours != theirs]
