"""A checkpoint's tokenizer: text and chats to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jinja2
from tokenizers import Tokenizer

from kvrelay.errors import CheckpointError, InvalidRequestError
from kvrelay.tokenizer.files import read_tokenizer_files
from kvrelay.tokenizer.token_bytes import TokenBytes
from router.text.chat_template import ChatTemplate
from router.text.detokenizer import decode
from router.text.token_count import TokenCount


class TextTokenizer:
    """Tokenizer and chat template of one model, as transformers would use them.

    ``special_tokens``: names such as ``bos_token`` to the text of the token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self._chat_template = ChatTemplate(chat_template, self._special_tokens) if chat_template else None
        self.tool_template = tool_template or chat_template
        self._tool_template = (
            ChatTemplate(tool_template, self._special_tokens) if tool_template else self._chat_template
        )
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read the tokenizer's files in ``model_dir``, see ``docs/checkpoints.md``.

        Raises CheckpointError if one of them is missing that must be there, or cannot be read or honoured.
        """
        tokenizer, special_tokens, templates = read_tokenizer_files(model_dir)
        try:
            return cls(tokenizer, special_tokens, templates.default, templates.with_tools)
        except (
            jinja2.TemplateError,
            SyntaxError,
            RecursionError,
            ValueError,
        ) as error:  # nested too deep, a long number
            raise CheckpointError(f"the chat template in {model_dir} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the tokenizer's config names one."""
        token_id: int | None = self._tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))
        return token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``; special tokens spelled out in it count as such."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def fewest_tokens(self, text: str) -> int:
        """Return how many tokens ``text`` has at least; costs next to nothing."""
        return self._token_count.fewest(text)

    @cached_property
    def _token_count(self) -> TokenCount:
        return TokenCount(self._tokenizer)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``."""
        return decode(self.token_bytes, token_ids, skip_special_tokens=skip_special_tokens)

    def tokens_of(self, token_ids: Iterable[int]) -> list[str]:
        """Return the vocabulary's own spelling of each id, empty for an id that is no token."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def special_ids(self, tokens: Iterable[str]) -> frozenset[int]:
        """Return the ids of those ``tokens`` that are special tokens."""
        ids = (self._tokenizer.token_to_id(token) for token in tokens)
        return frozenset(token_id for token_id in ids if token_id is not None and self.token_bytes.is_special(token_id))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, with_tools: bool = False, **options: Any) -> str:
        """Return the prompt text for ``messages``; ``options`` as for ``ChatTemplate.render``.

        ``with_tools``: by the template for chats with tools, if there is one.

        Raises InvalidRequestError if the model has no chat template, or that refuses the messages.
        """
        template = self._tool_template if with_tools else self._chat_template
        if template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        return template.render(messages, **options)
