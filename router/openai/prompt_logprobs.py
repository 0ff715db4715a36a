"""Log probabilities of prompts in vLLM's format, and as entries for the formats that tokens of the output have too."""

from __future__ import annotations

from collections.abc import Iterator

from kvrelay.errors import InvalidRequestError
from kvrelay.protocol.request import PromptLogprobs, TokenLogprobs
from kvrelay.tokenizer.token_bytes import TokenBytes
from router.openai.json_pieces import JsonItems, JsonPieces
from router.openai.logprobs import LOWEST
from router.openai.schemas import CompletionRequest, GenerationFields

MAX_PROMPT_LOGPROBS = 1 << 19
"""Log probabilities of prompt tokens in one answer, alternatives included. They take about 70 bytes each."""


def num_prompt_logprobs(request: GenerationFields) -> int | None:
    """Return how many alternatives to compute per prompt token; None: no log probabilities of prompts."""
    echoed = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
    wanted = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    return max(wanted, default=None)


def check_num_prompt_logprobs(num_tokens: int, num_alternatives: int, request: GenerationFields) -> None:
    """Raise InvalidRequestError if ``num_tokens``, of all prompts times ``n``, have too many log probabilities."""
    count = num_tokens * (1 + num_alternatives)
    if count > MAX_PROMPT_LOGPROBS:
        field = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequestError(
            f"{field}: {num_tokens} prompt tokens with {num_alternatives} alternatives each have {count} log "
            f"probabilities; the limit of one request is {MAX_PROMPT_LOGPROBS}",
            param=field,
        )


def entries(logprobs: PromptLogprobs) -> Iterator[tuple[int, TokenLogprobs]]:
    """Yield each prompt token with its log probability and those of its alternatives."""
    width = 1 + logprobs.num_alternatives
    token_ids = memoryview(logprobs.token_ids).cast("i").tolist()
    values: list[float] = memoryview(logprobs.logprobs).cast("d").tolist()  # type: ignore[assignment]
    for first in range(0, len(token_ids), width):
        end = first + width
        yield token_ids[first], TokenLogprobs(values[first], token_ids[first + 1 : end], values[first + 1 : end])


class PromptLogprobsField:
    """``prompt_logprobs`` of one choice, made into JSON as it comes: a list, beginning with null.

    Each item is an object of token ids: the token itself, then the ``num_alternatives`` most likely ones.
    """

    def __init__(self, token_bytes: TokenBytes, num_alternatives: int) -> None:
        self._token_bytes = token_bytes
        self._num_alternatives = num_alternatives
        self._items = JsonItems()
        self._items.add([None])

    def add(self, logprobs: PromptLogprobs) -> None:
        """Take those of the next tokens."""
        ranks = memoryview(logprobs.ranks).cast("i").tolist()
        self._items.add([self._item(*entry, rank) for entry, rank in zip(entries(logprobs), ranks, strict=True)])

    def as_json(self) -> JsonPieces:
        """Return them all."""
        return JsonPieces([b"[", *self._items.pieces, b"]"])

    def _item(self, token_id: int, entry: TokenLogprobs, rank: int) -> dict[str, object]:
        item = {str(token_id): self._entry(token_id, entry.logprob, rank)}
        tops = list(zip(entry.top_token_ids, entry.top_logprobs, strict=True))[: self._num_alternatives]
        for top_rank, (top_id, logprob) in enumerate(tops, 1):
            item[str(top_id)] = self._entry(top_id, logprob, top_rank)
        return item

    def _entry(self, token_id: int, logprob: float, rank: int) -> object:
        text = self._token_bytes.of(token_id).decode("utf-8", "replace")
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text}
