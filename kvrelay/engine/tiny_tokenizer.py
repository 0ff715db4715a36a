"""The tokenizer of a tiny checkpoint: every byte is a token, and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""Special tokens and one token per byte."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_LETTERS = (
    "e",
    "t",
    "a",
    "o",
    "i",
    "n",
    "s",
    "r",
    "h",
    "l",
    "d",
    "c",
    "u",
    "m",
    "f",
    "p",
    "g",
    "w",
    "y",
    "b",
    "v",
    "k",
)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``vocab_size`` tokens into ``path``.

    Ids beyond the bytes are letter combinations, so every id that a random model can generate has a text.
    """
    # scripts/gpu-check uses the rest of this module where this package is not installed
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(vocab_size - len(SPECIAL_TOKENS) - len(alphabet))
    words = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "unk_token": None,  # else transformers adds one to a tokenizer of Qwen2, beyond the vocabulary
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _merges(count: int) -> list[tuple[str, str]]:
    """Return ``count`` BPE merges: pairs of letters, then a letter before what an earlier merge made."""
    merges: list[tuple[str, str]] = []
    endings = list(_LETTERS)
    while len(merges) < count:
        merges += [(letter, ending) for ending in endings for letter in _LETTERS]
        endings = [letter + ending for ending in endings for letter in _LETTERS]
    return merges[:count]
