"""The layout of a directory of the ``file`` backend, stored at the beginning of its index."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import Self

_STRUCT = struct.Struct("<8s16sQQQQ")
_MAGIC = b"KVRIDX01"
_PAGE_BYTES = 4096

ENTRY_BYTES = 64
MAX_WAYS = 64
"""Slots per set. With this many, a set overflows only when nearly all are full, close to a global LRU."""

SETS_OFFSET = _PAGE_BYTES
"""Offset of the entries in the index."""

_MIN_SLAB_BYTES = 1 << 30
_MAX_SLABS = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """``num_sets`` sets of ``ways`` slots each; slot numbers run through the slabs in order."""

    namespace: bytes
    slot_bytes: int
    ways: int
    num_sets: int
    slots_per_slab: int

    @classmethod
    def plan(cls, namespace: bytes, value_bytes: int, capacity_bytes: int) -> Self:
        """Return the layout for values of ``value_bytes`` within ``capacity_bytes``; it may have no slots."""
        slot_bytes = -(-value_bytes // _PAGE_BYTES) * _PAGE_BYTES
        num_slots = max(0, capacity_bytes - SETS_OFFSET) // (slot_bytes + ENTRY_BYTES)
        ways = min(MAX_WAYS, num_slots)
        slab_bytes = max(_MIN_SLAB_BYTES, capacity_bytes // _MAX_SLABS)
        return cls(namespace, slot_bytes, ways, num_slots // ways if ways else 0, max(1, slab_bytes // slot_bytes))

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """Return the layout at the beginning of an index, or None if there is none."""
        if len(data) < _STRUCT.size:
            return None
        magic, *fields = _STRUCT.unpack_from(data)
        return cls(*fields) if magic == _MAGIC else None

    def pack(self) -> bytes:
        """Return the beginning of an index of this layout."""
        return _STRUCT.pack(_MAGIC, *astuple(self))

    @property
    def num_slots(self) -> int:
        """Maximum number of blocks."""
        return self.num_sets * self.ways

    @property
    def set_bytes(self) -> int:
        """Bytes of one set in the index."""
        return self.ways * ENTRY_BYTES

    @property
    def index_bytes(self) -> int:
        """Length of the index."""
        return SETS_OFFSET + self.num_sets * self.set_bytes

    @property
    def slab_slots(self) -> list[int]:
        """Slots of each slab."""
        full, rest = divmod(self.num_slots, self.slots_per_slab)
        return [self.slots_per_slab] * full + [rest] * (rest > 0)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return self.index_bytes + self.num_slots * self.slot_bytes
