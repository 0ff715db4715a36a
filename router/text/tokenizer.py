"""A checkpoint's tokenizer: text and chats to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer, processors

from kvrelay.core.errors import CheckpointError, InvalidRequestError
from router.text.chat_template import ChatTemplate
from router.text.detokenizer import decode
from router.text.token_bytes import TokenBytes
from router.text.token_count import TokenCount

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """Tokenizer and chat template of one model, as transformers would use them."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], chat_template: str | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_tokens = {name: _text_of(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
        if "add_bos_token" in config or "add_eos_token" in config:
            tokenizer.post_processor = self._begin_and_end(config)
        source = chat_template or _default_template(config.get("chat_template"))
        self._chat_template = ChatTemplate(source, self._special_tokens) if source else None
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read ``tokenizer.json`` and, if there, ``tokenizer_config.json`` and ``chat_template.jinja``.

        Raises CheckpointError if one of them is missing that must be there, or cannot be read.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the router tokenizes with it")
        template_path, config_path = model_dir / "chat_template.jinja", model_dir / "tokenizer_config.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
            config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
            template = template_path.read_text("utf-8") if template_path.is_file() else None
            return cls(tokenizer, config, template)
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise CheckpointError(f"the tokenizer in {model_dir} cannot be read: {error}") from error

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

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the prompt text for ``messages``; ``options`` as for ``ChatTemplate.render``.

        Raises InvalidRequestError if the model has no chat template, or that refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        return self._chat_template.render(messages, **options)

    def _begin_and_end(self, config: Mapping[str, Any]) -> processors.TemplateProcessing:
        """Return what puts the tokens around a text that the config asks for."""
        names = [name for name in ("bos_token", "eos_token") if config.get(f"add_{name}")]
        tokens = {name: self._special_tokens[name] for name in names if name in self._special_tokens}
        before, after = tokens.get("bos_token", ""), tokens.get("eos_token", "")
        return processors.TemplateProcessing(
            single=" ".join(filter(None, [before, "$A", after])),
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in set(tokens.values())],
        )


def _text_of(token: str | Mapping[str, Any]) -> str:
    """Return the text of a special token, which configs give as such or as an object with its ``content``."""
    return token if isinstance(token, str) else str(token["content"])


def _default_template(setting: str | Sequence[Mapping[str, str]] | None) -> str | None:
    """Return the chat template of a tokenizer config that may hold several named ones."""
    if setting is None or isinstance(setting, str):
        return setting
    return {item["name"]: item["template"] for item in setting}.get("default")
