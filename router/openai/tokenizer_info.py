"""``/tokenizer_info``: tokenizer data for clients that prepare prompts themselves."""

from __future__ import annotations

from router.model import ServedModel

DEFAULT_CLASS = "PreTrainedTokenizerFast"
"""The class for ``tokenizer.json`` if the config names none."""


def tokenizer_info(model: ServedModel) -> dict[str, object]:
    """Return the content of ``tokenizer_config.json``, with a class and the chat template in use."""
    info: dict[str, object] = {"tokenizer_class": DEFAULT_CLASS, **model.tokenizer_config}
    if model.tokenizer.chat_template is not None:
        info["chat_template"] = model.tokenizer.chat_template
    return info
