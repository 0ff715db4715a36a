"""The tokenizer of engines without a model, with a chat template."""

from __future__ import annotations

from kvrelay.tokenizer.plain import plain_tokens
from router.text.tokenizer import TextTokenizer

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def plain_tokenizer(vocab_size: int) -> TextTokenizer:
    """Return a tokenizer whose ids 0 to 255 are the bytes, with made-up texts for further ids."""
    return TextTokenizer(plain_tokens(vocab_size), {}, _CHAT_TEMPLATE)
