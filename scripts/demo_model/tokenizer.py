"""The tokenizer: one token per known word with its leading space, bytes for everything else.

A byte-level BPE without merges that takes a pre-token as a whole if the vocabulary has it (``ignore_merges``) and
spells it in bytes otherwise. So any text round-trips, and every decoded piece carries its own space, as a stream needs.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from demo_model.vocabulary import NUMBERS, words

BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{{ '<|system|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ (message['content'] or '') + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A word, up to three digits (each with the space before it), one mark, or a run of white space.
_PRE_TOKEN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]|\n+|\s+(?!\S)|\s"
_SPACE = "\u0120"  # how the byte-level alphabet writes a space
_NEWLINE = "\u010a"


def build_tokenizer() -> Tokenizer:
    """The tokenizer of the demo model; the same on every call."""
    vocab = {token: index for index, token in enumerate(_tokens())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = Split(Regex(_PRE_TOKEN), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The text of a chat, exactly as ``CHAT_TEMPLATE`` renders it (a test holds the two together)."""
    turns = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return BEGIN + turns + (ASSISTANT if add_generation_prompt else "")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token of the vocabulary. Raises KeyError if it has none."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into ``folder``."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)
    end, begin = token_id(tokenizer, END), token_id(tokenizer, BEGIN)
    generation = {
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
        "do_sample": False,
        "temperature": 0.0,  # what a server takes that knows no do_sample: an answer is right or wrong, not likely
    }
    _write_json(folder / "generation_config.json", generation)


def _tokens() -> list[str]:
    """Special tokens, the 256 bytes, words that begin a message, then every word and number with its leading space."""
    known = [_SPACE + word for word in words()]
    bare = [form for word in words() if word[0].isupper() for form in (word, word.lower())]
    numbers = [f"{_SPACE}{number}" for number in NUMBERS]
    everything = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), _NEWLINE * 2, *bare, *known, *numbers]
    return list(dict.fromkeys(everything))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
