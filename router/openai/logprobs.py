"""Logprobs in the two formats of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from kvrelay.protocol.request import TokenLogprobs
from kvrelay.tokenizer.token_bytes import TokenBytes
from router.openai.json_pieces import JsonItems, JsonPieces

LOWEST = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""


Logprobs: TypeAlias = dict[str, list[object]]
"""``logprobs`` of some tokens of a choice: an object of lists."""


class WholeLogprobs:
    """``logprobs`` of a whole choice, made into JSON as its tokens come: at the end that would be too long a turn."""

    def __init__(self) -> None:
        self._lists: dict[str, JsonItems] = {}

    def add(self, logprobs: Mapping[str, list[object]]) -> None:
        """Take those of the next tokens."""
        for name, items in logprobs.items():
            self._lists.setdefault(name, JsonItems()).add(items)

    def as_json(self) -> JsonPieces:
        """Return them all."""
        pieces: list[bytes] = []
        for name, items in self._lists.items():
            pieces += [b'%s"%s":[' % (b"," if pieces else b"{", name.encode()), *items.pieces, b"]"]
        return JsonPieces([*pieces, b"}"])


class CompletionLogprobs:
    """``logprobs`` of a completion's choice; tracks the text offset of each token.

    ``first_token_id``: of a prompt that is echoed. Nothing comes before it, so it has no logprobs.
    """

    def __init__(self, token_bytes: TokenBytes, num_logprobs: int, first_token_id: int | None = None) -> None:
        self._token_bytes = token_bytes
        self._num_logprobs = num_logprobs
        self._first_token_id = first_token_id
        self._text_offset = 0

    def of(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Logprobs:
        """Return the next tokens' logprobs, as parallel lists; those of the first token of the prompt before them."""
        tokens = [_name(self._token_bytes, token_id) for token_id in token_ids]
        token_logprobs: list[object] = [max(item.logprob, LOWEST) for item in logprobs]
        tops: list[object] = [self._top(token, item) for token, item in zip(tokens, logprobs, strict=True)]
        if self._first_token_id is not None:
            tokens.insert(0, _name(self._token_bytes, self._first_token_id))
            token_logprobs.insert(0, None)
            tops.insert(0, None)
            self._first_token_id = None
        offsets: list[object] = []
        for token in tokens:
            offsets.append(self._text_offset)
            self._text_offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": token_logprobs,
            "tokens": list(tokens),
            "top_logprobs": tops,
        }

    def _top(self, token: str, item: TokenLogprobs) -> dict[str, float]:
        """Return the most likely tokens and, if not among them, the sampled one."""
        pairs = list(zip(item.top_token_ids, item.top_logprobs, strict=True))[: self._num_logprobs]
        top = {_name(self._token_bytes, token_id): max(logprob, LOWEST) for token_id, logprob in pairs}
        return {**top, token: top.get(token, max(item.logprob, LOWEST))}


def chat_logprobs(token_bytes: TokenBytes, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Logprobs:
    """Return ``logprobs`` of a chat completion's choice: one object per token."""
    content: list[object] = [
        {
            **_entry(token_bytes, token_id, item.logprob),
            "top_logprobs": [
                _entry(token_bytes, top_id, logprob)
                for top_id, logprob in zip(item.top_token_ids, item.top_logprobs, strict=True)
            ],
        }
        for token_id, item in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content}


def _entry(token_bytes: TokenBytes, token_id: int, logprob: float) -> dict[str, object]:
    piece = token_bytes.of(token_id)
    return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(piece)}


def _name(token_bytes: TokenBytes, token_id: int) -> str:
    r"""Return a token's text, or ``bytes:\xf0\x9f`` for a part of a character, so that all are distinct."""
    piece = token_bytes.of(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
