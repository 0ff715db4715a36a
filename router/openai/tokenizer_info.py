"""``/tokenizer_info``: what a client needs to know to prepare prompts itself."""

from __future__ import annotations

from router.model import ServedModel

DEFAULT_CLASS = "PreTrainedTokenizerFast"
"""What ``tokenizer.json`` is loaded as where the config names no class."""


def tokenizer_info(model: ServedModel) -> dict[str, object]:
    """Return the content of ``tokenizer_config.json``, with a class in any case and the chat template in use."""
    info: dict[str, object] = {"tokenizer_class": DEFAULT_CLASS, **model.tokenizer_config}
    if model.tokenizer.chat_template is not None:
        info["chat_template"] = model.tokenizer.chat_template
    return info
