"""What each token adds to the text, as bytes.

The decoders of `tokenizers` turn a whole sequence into text; calling one again for every new token costs time that
grows with the sequence, and a character split over tokens comes out as replacement characters first. Every decoder in
use is, underneath, a map from tokens to bytes whose concatenation is UTF-8, so this module finds that map and the
rest is a plain incremental UTF-8 decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class TokenBytes:
    """The bytes of each token of one tokenizer, found on first use.

    Byte-level BPE spells bytes as printable characters. Sentencepiece has text with a mark for the leading space, and
    256 tokens ``<0x00>`` to ``<0xFF>`` for what else there is. Added tokens are their own text in both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = set(_decoder_types(tokenizer))
        self._byte_level = _byte_of_char() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._anchor_id = None if self._byte_level else self._find_anchor(frozenset(added))
        self._cache: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        """Tell whether ``token_id`` is a control token such as an end of turn, usually not shown."""
        return token_id in self._special_ids

    def of(self, token_id: int) -> bytes:
        """Return what ``token_id`` adds to text that has already begun; nothing for an id that is no token."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._find(token_id)
        return known

    def of_first(self, token_id: int) -> bytes:
        """Return what ``token_id`` is as the first token of a text: sentencepiece drops its leading space."""
        if self._byte_level is not None or self._byte_of(token_id) is not None:
            return self.of(token_id)
        return self._decode(token_id).encode()

    def _find(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level is not None:
            codes = [self._byte_level.get(char) for char in token]
            return token.encode() if None in codes else bytes(code for code in codes if code is not None)
        byte = self._byte_of(token_id)
        if byte is not None:
            return byte
        if self._anchor_id is None:
            return self._decode(token_id).encode()
        return self._decode(self._anchor_id, token_id)[len(self._decode(self._anchor_id)) :].encode()

    def _byte_of(self, token_id: int) -> bytes | None:
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def _find_anchor(self, added_ids: frozenset[int]) -> int | None:
        """Return a plain token to decode others behind, so that they do not count as the first of a text."""
        for token_id in range(self._tokenizer.get_vocab_size()):
            if token_id not in added_ids and self._byte_of(token_id) is None:
                text = self._decode(token_id)
                if text.strip() and _REPLACEMENT not in text:
                    return token_id
        return None

    def _decode(self, *token_ids: int) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


def _decoder_types(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the type names of the tokenizer's decoder and of all that it is made of."""
    if tokenizer.decoder is not None:
        yield from _types_in(json.loads(tokenizer.decoder.__getstate__()))


def _types_in(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _types_in(part)


def _byte_of_char() -> dict[str, int]:
    """Return the alphabet of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
