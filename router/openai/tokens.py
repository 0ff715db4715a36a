"""``/tokenize`` and ``/detokenize``, as in vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router.model import ServedModel
from router.openai.chat import chat_prompt
from router.openai.fields import Fields
from router.openai.models import model_name
from router.openai.sampling import check_token_ids
from router.openai.schemas import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    parse,
)


def tokenized(
    body: dict[str, Any], model: ServedModel, max_model_len: int, check: Callable[[object], None]
) -> dict[str, object]:
    """Return the answer to ``/tokenize``; ``check`` may raise when the request has been read."""
    kind: type[Fields] = TokenizeChatRequest if body.get("messages") is not None else TokenizeTextRequest
    request = parse(kind, body)
    assert isinstance(request, TokenizeChatRequest | TokenizeTextRequest)
    model_name(request.model, model)
    check(request)
    token_ids = _token_ids(request, model)
    return {
        "count": len(token_ids),
        "max_model_len": max_model_len,
        "tokens": token_ids,
        "token_strs": model.tokenizer.tokens_of(token_ids) if request.return_token_strs else None,
    }


def num_chat_tokens(request: ChatCompletionRequest, model: ServedModel, check: Callable[[object], None]) -> int:
    """Return the number of tokens of a chat; ``check`` may raise before it is rendered."""
    model_name(request.model, model)
    check(request)
    return len(chat_prompt(request, model))


def detokenized(body: dict[str, Any], model: ServedModel) -> dict[str, object]:
    """Return the answer to ``/detokenize``."""
    request = parse(DetokenizeRequest, body)
    model_name(request.model, model)
    check_token_ids(request.tokens, model.vocab_size, "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special_tokens=False)}


def _token_ids(request: TokenizeChatRequest | TokenizeTextRequest, model: ServedModel) -> list[int]:
    if isinstance(request, TokenizeChatRequest):
        return chat_prompt(request, model)
    return model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
