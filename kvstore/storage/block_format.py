"""The format of a stored KV block: a header, then the payload.

::

    magic 4s | version u32 | namespace 16s | block hash 32s | payload bytes u64 | digest 16s | payload

``namespace`` is a hash of the geometry, which includes the digest of the model. It is the same on every role and host.
``digest`` is the xxh3_128 of everything before it and of the payload after it. It detects values that are torn,
truncated, mixed up or of another geometry. The payload is ``[num_layers, 2, plane_block_bytes]``.
"""

from __future__ import annotations

import struct
from hashlib import sha256

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.protocol.block_hash import HASH_BYTES
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.interface import BlockView

Value = npt.NDArray[np.uint8]
"""A header and a payload in contiguous memory."""

NAMESPACE_BYTES = 16
FORMAT_VERSION = 1

_MAGIC = b"KVRB"
_IDENTITY = struct.Struct(f"<4sI{NAMESPACE_BYTES}s{HASH_BYTES}sQ")
_DIGEST_BYTES = 16

HEADER_BYTES = _IDENTITY.size + _DIGEST_BYTES
"""Length of the header."""


class BlockFormat:
    """Packs and checks the values of one geometry. Immutable; used by any thread."""

    def __init__(self, geometry: KVGeometry) -> None:
        self.namespace = namespace_of(geometry)
        self.payload_bytes = geometry.block_bytes
        self.value_bytes = HEADER_BYTES + geometry.block_bytes
        self.block_shape = (geometry.num_layers, 2, geometry.plane_block_bytes)

    def payload(self, value: Value) -> BlockView:
        """Return a view of the KV in ``value``."""
        return value[HEADER_BYTES : self.value_bytes].reshape(self.block_shape)

    def seal(self, value: Value, block_hash: bytes) -> None:
        """Write the header of ``block_hash`` before the payload in ``value``."""
        identity = self._identity(block_hash)
        digest = xxhash.xxh3_128(identity)
        digest.update(value[HEADER_BYTES : self.value_bytes].data)
        value[:HEADER_BYTES] = np.frombuffer(identity + digest.digest(), np.uint8)

    def is_good(self, value: Value, block_hash: bytes) -> bool:
        """Whether ``value`` is the undamaged block ``block_hash`` of this geometry."""
        identity = self._identity(block_hash)
        return value[: len(identity)].tobytes() == identity and is_intact(value)

    def _identity(self, block_hash: bytes) -> bytes:
        return _IDENTITY.pack(_MAGIC, FORMAT_VERSION, self.namespace, block_hash, self.payload_bytes)


def namespace_of(geometry: KVGeometry) -> bytes:
    """Return the namespace of the blocks of ``geometry``."""
    return sha256(msgspec.json.encode(geometry)).digest()[:NAMESPACE_BYTES]


def is_intact(value: Value) -> bool:
    """Whether ``value`` is undamaged, in any geometry."""
    if len(value) < HEADER_BYTES:
        return False
    identity = value[: _IDENTITY.size].tobytes()
    magic, version, _, _, payload_bytes = _IDENTITY.unpack(identity)
    if (magic, version, payload_bytes) != (_MAGIC, FORMAT_VERSION, len(value) - HEADER_BYTES):
        return False
    digest = xxhash.xxh3_128(identity)
    digest.update(value[HEADER_BYTES:].data)
    return digest.digest() == value[_IDENTITY.size : HEADER_BYTES].tobytes()
