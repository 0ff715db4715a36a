"""Incremental detokenization."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvrelay.tokenizer.token_bytes import TokenBytes

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Converts output tokens to text at constant cost per token.

    What has been returned never changes: bytes that may yet become a character are held until they are one, or until
    what follows proves that they never will be (then they are U+FFFD, as in any UTF-8 decoder).
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._token_bytes = token_bytes
        self._skip_special_tokens = skip_special_tokens
        self._shown_ids = shown_ids
        self._utf8 = _Utf8Decoder("replace")
        self._prompt_token_ids = prompt_token_ids
        self._begun = False

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, which may be empty."""
        if self._skips(token_id):
            return ""
        if self._begun or self._follows_text():
            piece = self._token_bytes.of(token_id)
        else:
            piece = self._token_bytes.of_first(token_id)
        self._begun = True
        return self._utf8.decode(piece)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` complete, as ``push`` does one by one."""
        if len(token_ids) == 1 or not self._begun:
            return "".join(map(self.push, token_ids))
        pieces = [self._token_bytes.of(token_id) for token_id in token_ids if not self._skips(token_id)]
        return self._utf8.decode(b"".join(pieces))

    def finish(self) -> str:
        """Return the rest: a replacement character if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)

    def _follows_text(self) -> bool:
        """Tell whether the prompt is visible: text that continues it keeps its leading space.

        A prompt may be nothing but special tokens, so this is not done for all choices of a request at once.
        """
        return not all(map(self._skips, reversed(self._prompt_token_ids)))

    def _skips(self, token_id: int) -> bool:
        return self._skip_special_tokens and self._token_bytes.is_special(token_id) and token_id not in self._shown_ids


def decode(token_bytes: TokenBytes, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of ``token_ids`` as a text of its own."""
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=skip_special_tokens)
    return "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])
