"""Hashes of the fake engine: from tokens to KV words, from KV words to the next token. All modulo 2**64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrelay.errors import ConfigError
from kvrelay.protocol.geometry import KVGeometry

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FAVOURITE_LOGIT = np.float32(8.0)
_HIGHEST_OTHER_LOGIT = 6.0
_EOS_SALT, _TOKEN_SALT = 1, 2


def mix(values: UInt64) -> UInt64:
    """Return ``values`` scrambled so that every bit depends on every other (the finaliser of splitmix64)."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _mix_one(value: int) -> int:
    return int(mix(np.array([value % (1 << 64)], np.uint64))[0])


@dataclass(slots=True)
class Context:
    """State of the hash over one sequence's tokens. Extending it costs time for the new tokens only."""

    num_tokens: int = 0
    total: int = 0

    def extend(self, token_ids: Sequence[int]) -> UInt64:
        """Return for each of ``token_ids``, which come next, a hash of all tokens up to it."""
        positions = np.arange(self.num_tokens, self.num_tokens + len(token_ids), dtype=np.uint64)
        terms = mix(np.array(token_ids, np.uint64) ^ mix(positions))
        totals = np.cumsum(terms, dtype=np.uint64) + np.uint64(self.total)
        self.num_tokens += len(token_ids)
        self.total = int(totals[-1])
        return mix(totals + positions)


class KVWords:
    """What the fake engine stores for a token, as 64-bit words: [layers * 2 planes, tokens, words_per_token]."""

    def __init__(self, geometry: KVGeometry) -> None:
        token_bytes = geometry.num_kv_heads * geometry.head_dim
        if token_bytes % 8:
            raise ConfigError([f"engine.fake: num_kv_heads * head_dim should be a multiple of 8, not {token_bytes}"])
        self.words_per_token = token_bytes // 8
        shape = (geometry.num_layers * 2, 1, self.words_per_token)
        self._salts = mix(np.arange(np.prod(shape), dtype=np.uint64)).reshape(shape)
        self._weights = (self._salts | np.uint64(1))[:, 0]

    def of_tokens(self, chain: UInt64) -> UInt64:
        """Return the words of tokens whose chained hashes are ``chain``."""
        return mix(chain[None, :, None] ^ self._salts)

    def context_hash(self, words: UInt64, first_position: int = 0) -> int:
        """Return a hash of ``words`` of consecutive positions; hashes of two stretches add up to that of both.

        Each word is multiplied by an odd weight of its plane and an odd weight of its position, so swapped words change
        the hash.
        """
        return int(self._weighted(words, first_position).sum(dtype=np.uint64))

    def context_hashes(self, words: UInt64) -> UInt64:
        """Return ``context_hash`` of the first, of the first two, and so on to all of ``words``, from position 0 on."""
        return np.cumsum(self._weighted(words, 0), dtype=np.uint64)

    def _weighted(self, words: UInt64, first_position: int) -> UInt64:
        per_token = np.einsum("ptw,pw->t", words, self._weights)
        positions = np.arange(first_position, first_position + len(per_token), dtype=np.uint64)
        weighted: UInt64 = per_token * (np.uint64(2) * positions + np.uint64(1))
        return weighted


def favourite_token(context_hash: int, vocab_size: int, eos_token_ids: Sequence[int], eos_every: int) -> int:
    """Return the most likely token after a context: an EOS once in ``eos_every`` contexts (0: never), else no EOS."""
    eos = [token for token in eos_token_ids if token < vocab_size]
    if eos and eos_every and _mix_one(context_hash + _EOS_SALT) % eos_every == 0:
        return eos[0]
    token = _mix_one(context_hash + _TOKEN_SALT) % vocab_size
    while token in eos and len(eos) < vocab_size:
        token = (token + 1) % vocab_size
    return token


def fake_logits(context_hash: int, vocab_size: int, favourite: int) -> npt.NDArray[np.float32]:
    """Return logits [vocab_size] that look random, with ``favourite`` clearly the highest."""
    hashes = mix(np.uint64(context_hash) + np.arange(vocab_size, dtype=np.uint64) * _GOLDEN)
    logits = (hashes >> np.uint64(40)).astype(np.float32) * np.float32(_HIGHEST_OTHER_LOGIT / (1 << 24))
    logits[favourite] = _FAVOURITE_LOGIT
    return logits
