"""Makes prompts of a wanted number of tokens, the same for the same key."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from kvrelay.bench.errors import BenchError

Content = str | list[int]
"""A prompt: a text or token ids."""

_ROUNDS = 10
"""A text whose tokens differ from those that it was made of is shortened or made longer this many times."""

_WORDS = [a + b + c + d for a in "bdfgklmn" for b in "aeiou" for c in "prstvz" for d in "aeiou"]

CHARS_PER_TOKEN = 4
"""An estimate for texts without a tokenizer."""


class PromptMaker(Protocol):
    """Makes parts of prompts and joins them."""

    def part(self, key: object, num_tokens: int) -> Content:
        """Return a part of about ``num_tokens`` tokens that depends on ``key`` only; a longer one begins with it."""

    def join(self, parts: Sequence[Content]) -> Content:
        """Return one prompt of all ``parts``."""

    def count(self, content: Content) -> int:
        """Return the number of tokens, or an estimate."""


class TokenIdPrompts:
    """Prompts of token ids drawn from ``token_ids``. Lengths are exact."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids

    def part(self, key: object, num_tokens: int) -> Content:
        return _rng(key).choices(self._token_ids, k=num_tokens)

    def join(self, parts: Sequence[Content]) -> Content:
        return [token_id for part in parts for token_id in part if isinstance(token_id, int)]

    def count(self, content: Content) -> int:
        return len(content)


class TokenizedTextPrompts:
    """Texts made of tokens of ``tokenizer``. A text's own tokens may differ by a few in number."""

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._token_ids = token_ids

    def part(self, key: object, num_tokens: int) -> Content:
        rng = _rng(key)
        ids = rng.choices(self._token_ids, k=num_tokens)
        for _ in range(_ROUNDS):
            text = str(self._tokenizer.decode(ids))
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == num_tokens:
                break
            ids = ids[:num_tokens] + rng.choices(self._token_ids, k=max(0, num_tokens - len(ids)))
        return str(self._tokenizer.decode(ids))

    def join(self, parts: Sequence[Content]) -> Content:
        return "".join(str(part) for part in parts)

    def count(self, content: Content) -> int:
        return len(self._tokenizer.encode(str(content), add_special_tokens=False).ids)


class WordPrompts:
    """Texts of invented words, for servers whose tokenizer is not known; ``tokens_per_word`` is measured."""

    def __init__(self, tokens_per_word: float) -> None:
        self._tokens_per_word = tokens_per_word

    def part(self, key: object, num_tokens: int) -> Content:
        return words(key, max(1, round(num_tokens / self._tokens_per_word)))

    def join(self, parts: Sequence[Content]) -> Content:
        return " ".join(str(part) for part in parts)

    def count(self, content: Content) -> int:
        return max(1, len(str(content)) // CHARS_PER_TOKEN)


def words(key: object, count: int) -> str:
    """Return a text of ``count`` words."""
    return " ".join(_rng(key).choices(_WORDS, k=count))


def read_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``, given its directory or itself. Raises BenchError if there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise BenchError(f"{file}: not a tokenizer.json: {error}") from error


def plain_token_ids(tokenizer: Tokenizer, vocab_size: int | None) -> list[int]:
    """Return the ids below ``vocab_size`` that a text may have: no special ones."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    limit = tokenizer.get_vocab_size() if vocab_size is None else min(vocab_size, tokenizer.get_vocab_size())
    return [token_id for token_id in range(limit) if token_id not in special and tokenizer.id_to_token(token_id)]


def _rng(key: object) -> random.Random:
    return random.Random(repr(key))
