"""Block hashes: names of KV blocks that are equal on all nodes.

The KV of a block depends on its tokens, on all tokens before them and on the model. So does its hash::

    root          = sha256(sha256(model_digest) + sha256(salt))
    block_hash[i] = sha256(block_hash[i - 1] + tokens of block i as little-endian u32),   block_hash[-1] = root

Equal hashes mean equal KV, because a chained hash depends on the whole prefix. The hash is cryptographic, because
prompts are untrusted: a client that could construct a collision could read the context of another client from the
prefix cache. Requests with different salts, such as those of different tenants, share no KV.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

from kvrelay.errors import LocalProtocolError

HASH_BYTES = 32
"""Length of a block hash."""

PREFIX_KEY_BYTES = 8
"""Length of a prefix key: the first bytes of a block hash. Routing compares keys. Blocks are shared by whole hashes."""

_TOKEN_BYTES = 4


class BlockHasher:
    """Hashes the full blocks of token sequences; a last block that is not full has no hash.

    ``model_digest`` is the one of the ``KVGeometry``; ``block_size`` is in tokens. Immutable.
    """

    __slots__ = ("block_size", "root")

    def __init__(self, model_digest: str, block_size: int, salt: str = "") -> None:
        self.block_size = block_size
        self.root = sha256(sha256(model_digest.encode()).digest() + sha256(salt.encode()).digest()).digest()

    def hashes(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the hash of each full block of ``token_ids``, first block first.

        Raises LocalProtocolError if a token id is not a u32.
        """
        block_hashes: list[bytes] = []
        self.extend(block_hashes, token_ids)
        return block_hashes

    def extend(self, hashes: list[bytes], token_ids: Sequence[int]) -> None:
        """Append to ``hashes``, the hashes of the first blocks of ``token_ids``, those of the other full blocks.

        Raises LocalProtocolError, and leaves ``hashes`` unchanged, if a token id is not a u32 or if there are more
        hashes than full blocks.
        """
        num_known, num_full = len(hashes), len(token_ids) // self.block_size
        if num_known == num_full:
            return
        if num_known > num_full:
            raise LocalProtocolError(
                f"{num_known} block hashes for {len(token_ids)} tokens, which fill only {num_full} blocks"
            )
        block_bytes = self.block_size * _TOKEN_BYTES
        data = _little_endian(token_ids[num_known * self.block_size : num_full * self.block_size])
        parent = hashes[-1] if hashes else self.root
        for start in range(0, len(data), block_bytes):
            parent = sha256(parent + data[start : start + block_bytes]).digest()
            hashes.append(parent)


def _little_endian(token_ids: Sequence[int]) -> bytes:
    try:
        words = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise LocalProtocolError(f"token ids must be integers from 0 to 2**32 - 1: {error}") from error
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
