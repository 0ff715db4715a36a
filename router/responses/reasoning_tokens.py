"""The number of tokens of an output that are reasoning."""

from __future__ import annotations

from collections import deque

from kvrelay.tokenizer.token_bytes import TokenBytes
from router.openai.choice import Delta
from router.tools.parts import Reasoning


class ReasoningTokens:
    """Counts the first tokens of an output that together are as long as its reasoning.

    The count does not depend on how the output is cut into deltas: parsers hold text back, and know nothing of tokens.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.count = 0
        self._token_bytes = token_bytes
        self._missing_bytes = 0
        self._lengths: deque[int] = deque()
        self._is_over = False

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        if self._is_over or delta.parts is None:
            return
        self._lengths.extend(len(self._token_bytes.of(token_id)) for token_id in delta.token_ids)
        for part in delta.parts:
            if isinstance(part, Reasoning):
                self._missing_bytes += len(part.text.encode("utf-8", "surrogatepass"))
            else:
                self._is_over = True
        while self._missing_bytes > 0 and self._lengths:
            self._missing_bytes -= self._lengths.popleft()
            self.count += 1
        if self._is_over:
            self._lengths.clear()
