"""How many tokens a text has at least, without tokenizing it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

_SHRINKAGE = {"Sequence": 1, "Prepend": 1, "NFD": 1, "NFC": 4}
"""Normalizers that drop nothing, and how many times fewer bytes of UTF-8 each may make of a text, rounded up."""

_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}
"""Pre-tokenizers that drop nothing (Split and Punctuation only unless told to)."""


class TokenCount:
    """Counts from below: no token stands for more bytes than the longest one of the vocabulary.

    That holds for BPE that keeps all of the text and knows every byte. Of other tokenizers nothing is known: any text
    may be a single token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._max_bytes_per_token = _max_bytes_per_token(tokenizer)

    def fewest(self, text: str) -> int:
        """Return the number of tokens that ``text`` has at least."""
        if self._max_bytes_per_token is None:
            return min(1, len(text))
        return -(-len(text.encode()) // self._max_bytes_per_token)


def _max_bytes_per_token(tokenizer: Tokenizer) -> int | None:
    shrinkage = _shrinkage(tokenizer)
    if shrinkage is None or not (_keeps_all_text(tokenizer) and _knows_every_byte(tokenizer)):
        return None
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    return shrinkage * max(len(token.encode()) for token in tokens)


def _shrinkage(tokenizer: Tokenizer) -> int | None:
    """Return how many times shorter the normalizer may make a text; None if that is not known."""
    product = 1
    for part in _parts(tokenizer.normalizer, "normalizers"):
        known = 1 if part["type"] == "Replace" and _grows(part) else _SHRINKAGE.get(part["type"])
        if known is None:
            return None
        product *= known
    return product


def _grows(replace: dict[str, Any]) -> bool:
    """Tell whether what is put in place of a fixed string is no shorter."""
    pattern = replace["pattern"].get("String")
    return pattern is not None and len(replace["content"].encode()) >= len(pattern.encode())


def _keeps_all_text(tokenizer: Tokenizer) -> bool:
    parts = _parts(tokenizer.pre_tokenizer, "pretokenizers")
    strip = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    return not strip and all(part["type"] in _PRE_TOKENIZERS and part.get("behavior") != "Removed" for part in parts)


def _knows_every_byte(tokenizer: Tokenizer) -> bool:
    """Tell whether no part of a text can be unknown, which might be dropped, or be one token however long it is."""
    if not isinstance(tokenizer.model, models.BPE):
        return False
    bytes_as_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if tokenizer.model.byte_fallback else []
    kinds = {part["type"] for part in _parts(tokenizer.pre_tokenizer, "pretokenizers")}
    needed = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in kinds else bytes_as_tokens
    return bool(needed) and all(tokenizer.token_to_id(token) is not None for token in needed)


def _parts(component: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the settings of a normalizer or pre-tokenizer and of all that it is made of."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()), inner)


def _flat(settings: dict[str, Any], inner: str) -> Iterator[dict[str, Any]]:
    yield settings
    for part in settings.get(inner, ()):
        yield from _flat(part, inner)
