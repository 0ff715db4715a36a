"""A model's tokens as grammars see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from llguidance import LLTokenizer

from kvrelay.tokenizer.files import read_tokenizer_files
from kvrelay.tokenizer.plain import plain_tokens
from kvrelay.tokenizer.token_bytes import TokenBytes


class Vocabulary:
    """The bytes of each token id below ``size``, and one more token, ``end``: the end of the text.

    No model has ``end``. Its bit in a mask says that the text may end, and with it every token that ends a request.
    """

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int]) -> None:
        self.size = len(tokens)
        self.end = self.size
        self.tokens = LLTokenizer(_Tokens([*tokens, b"<end>"], [*special_ids, self.end], self.end))  # type: ignore[arg-type]

    @classmethod
    def of(cls, token_bytes: TokenBytes, vocab_size: int) -> Self:
        """Return the tokens of a model of ``vocab_size``; ids that are no tokens are never allowed."""
        tokens = [token_bytes.of(token_id) for token_id in range(vocab_size)]
        return cls(tokens, [token_id for token_id in range(vocab_size) if token_bytes.is_special(token_id)])

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> Self:
        """Return the tokens of a checkpoint. Raises CheckpointError if its tokenizer cannot be read."""
        return cls.of(TokenBytes(read_tokenizer_files(model_dir).tokenizer), vocab_size)

    @classmethod
    def plain(cls, vocab_size: int) -> Self:
        """Return the tokens of an engine without a model."""
        return cls.of(TokenBytes(plain_tokens(vocab_size)), vocab_size)


class _Tokens:
    """What LLTokenizer reads from a tokenizer in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        """Never called for masks: only forced text is tokenized, and none is forced."""
        raise NotImplementedError
