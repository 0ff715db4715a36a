"""Chats through templates with the constructs of many model families, against what transformers makes of them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from golden.chat_cases import CHATS, CHATS_FILE, SPECIAL_TOKENS, TEMPLATES

from kvrelay.core.errors import InvalidRequestError
from router.openai.schemas import TokenizeChatRequest, parse
from router.text.chat_template import ChatTemplate

GOLDEN = json.loads(CHATS_FILE.read_text())["cases"]


@cache
def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL_TOKENS)


def rendered(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the prompt for messages as a client sends them."""
    request = parse(TokenizeChatRequest, {"messages": messages})
    return template_of(source).render([message.model_dump() for message in request.messages], **options)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_becomes_the_prompt_of_transformers(name: str, chat: str) -> None:
    messages, options, variables = CHATS[chat]
    expected = GOLDEN[name][chat]
    if expected is None:
        with pytest.raises(InvalidRequestError):
            rendered(TEMPLATES[name].source, messages, **options, variables=variables)
    else:
        assert rendered(TEMPLATES[name].source, messages, **options, variables=variables) == expected
