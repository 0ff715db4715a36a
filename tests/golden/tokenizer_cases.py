"""Tokenizers in the layouts of real model families, as files of a checkpoint, and texts for them.

``scripts/make_text_golden`` has transformers tokenize the texts; the tests compare with what it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TOKENIZED_FILE = Path(__file__).parent / "tokenized.json"

TEXTS = [
    "",
    " ",
    "Hello world, hello there!",
    "  two spaces before, and two behind  ",
    "\n\nfirst\r\n\tsecond \n",
    "<s>Hello</s><|im_start|>user\nHi<|im_end|>\n",
    "a <mark> b<mark>c  <mark>  d<MARK>e markmark mark",
    "<s> hello <s>hello<unk> <pad><|endoftext|> <bos><|pad|>",
    "emoji 😀👨‍👩‍👧🇩🇪 done",
    "你好，世界。今天天气很好 こんにちは 안녕하세요",
    "combined e\u0301 composed \u00e9, o\u0308 \u00f6, \ufb01 ligature, \u212b",
    "def f(x):\n    return x + 1234567 # it's we'll I'M\n",
    "a" * 120,
    " " * 33 + "x" + "\n" * 9,
    "control \x00\x01\x1b[0m \x7f\u200b\u00a0\u2028 \ufeffbom",
    "URL https://example.org/a?b=c&d=%20e ... --- ===",
    "▁meta ▁ space Ġ and Ċ <0x0A> [UNK]",
    "naïve Straße ÜBER ﷺ \U0001d4d7 𠮷",
    "<extra> <image>one<|tool|>two <call> three",
]

_WORDS = ["hello", "Hello", "world", "there", "the", "two", "spaces", "def", "return", "first", "mark", "user", "done"]
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class TokenizerCase(NamedTuple):
    """One checkpoint's files: a tokenizer, and the JSON files beside it."""

    tokenizer: Callable[[], Tokenizer]
    files: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Write the files into ``directory``."""
        self.tokenizer().save(str(directory / "tokenizer.json"))
        for name, content in self.files.items():
            (directory / name).write_text(json.dumps(content), "utf-8")


def _merges(space: str) -> list[tuple[str, str]]:
    """Return merges that make the words, with and without a space before them, from their letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in [*_WORDS, *(space + word for word in _WORDS)]:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    return [*merges, (space, space), (space * 2, space * 2)]


def byte_level(
    *before: Any, normalizer: Any = None, first: Sequence[str] = (), ignore_merges: bool = False, regex: bool = False
) -> Tokenizer:
    """Return a byte-level BPE; its ids begin with the tokens of ``first``."""
    merges = _merges("Ġ")
    words = dict.fromkeys([*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)])
    vocab = {word: index for index, word in enumerate([*words, "ĠHell", "12345"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentence_piece(specials: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """Return a BPE with byte fallback, with the normalizer of Llama 2's ``tokenizer.json``."""
    merges = _merges("▁")
    letters = sorted({letter for word in _WORDS for letter in word} | set("▁.,!?:<>/abcxyz0123456789"))
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """Return the same vocabulary behind a Metaspace pre-tokenizer."""
    tokenizer = sentence_piece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    return tokenizer


def unigram() -> Tokenizer:
    """Return a Unigram with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    scored = [(piece, -1.0 - index / 50) for index, piece in enumerate([*pieces, *_WORDS, *("▁" + w for w in _WORDS)])]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return with_template(tokenizer, "$A </s>", "</s>")


def word_piece() -> Tokenizer:
    """Return a WordPiece as in BERT."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters), *map(str.lower, _WORDS)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return with_template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


def with_template(tokenizer: Tokenizer, single: str, *specials: str) -> Tokenizer:
    """Return ``tokenizer`` with a post-processor."""
    ids = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def _with_added(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return tokenizer


def _chatml() -> Tokenizer:
    tokenizer = byte_level(_split(_QWEN), normalizer=normalizers.NFC())
    return _with_added(tokenizer, "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _llama3(first: str = "<|begin|>") -> Tokenizer:
    tokenizer = _with_added(byte_level(_split(_LLAMA3), ignore_merges=True), first, "<|eot|>")
    return with_template(tokenizer, f"{first} $A", first)


def _llama2() -> Tokenizer:
    return with_template(sentence_piece(), "<s> $A", "<s>")


def _padded() -> Tokenizer:
    tokenizer = _with_added(byte_level(regex=True), "<|endoftext|>")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16, pad_token="<|pad|>", pad_id=0)
    return tokenizer


def _added(content: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **off, **flags}


def _end(tokenizer: Callable[[], Tokenizer]) -> int:
    size: int = tokenizer().get_vocab_size(with_added_tokens=True)
    return size


def _next(tokenizer: Callable[[], Tokenizer], *tokens: dict[str, Any]) -> dict[str, Any]:
    """Return ``added_tokens_decoder`` with tokens that only it knows."""
    return {str(_end(tokenizer) + offset): token for offset, token in enumerate(tokens)}


def _case(tokenizer: Callable[[], Tokenizer], model_type: str | None, /, **settings: Any) -> TokenizerCase:
    model = {} if model_type is None else {"config.json": {"model_type": model_type}}
    return TokenizerCase(tokenizer, {"tokenizer_config.json": settings, **model})


def _plain() -> Tokenizer:
    return byte_level(regex=True)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_MAP = {"bos_token": _added("<s>", lstrip=True), "eos_token": "</s>", "additional_special_tokens": ["<mark>"]}

CASES: dict[str, TokenizerCase] = {
    "gpt2": _case(
        lambda: _with_added(_plain(), "<|endoftext|>"), "llama", tokenizer_class="GPT2Tokenizer", add_bos_token=True
    ),
    "gpt2_with_digits_in_the_file": _case(
        lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
        "llama",
        tokenizer_class="GPT2TokenizerFast",
        add_prefix_space=True,
    ),
    "qwen2": _case(
        _chatml,
        "qwen2",
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        unk_token=None,
        add_bos_token=False,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        added_tokens_decoder={
            str(_end(_chatml) - 3 + index): _added(token, special=True)
            for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        }
        | _next(_chatml, _added("<|tool|>", special=True), _added("<call>")),
    ),
    "qwen2_with_another_class_declared": _case(
        _llama3, "qwen2", tokenizer_class="LlamaTokenizerFast", bos_token="<|begin|>", add_bos_token=True
    ),
    "qwen3_with_a_pipeline_of_its_own": _case(
        lambda: _with_added(byte_level(regex=True), "<|endoftext|>"), "qwen3", **FAST, eos_token="<|endoftext|>"
    ),
    "qwen3_that_declares_nothing": _case(_plain, "qwen3"),
    "llama3": _case(_llama3, "llama", **FAST, bos_token="<|begin|>", eos_token="<|eot|>"),
    "llama3_declared_as_llama2": _case(
        lambda: _llama3("<s>"), "llama", **LLAMA, add_bos_token=False, add_eos_token=True
    ),
    "llama2": _case(_llama2, "llama", **LLAMA, legacy=False, add_bos_token=True, add_eos_token=False),
    "llama2_legacy": _case(_llama2, "llama", **LLAMA, legacy=True),
    "llama2_without_prefix_space": _case(_llama2, "llama", **LLAMA, legacy=None, add_prefix_space=False),
    "llama2_with_bos_that_the_file_does_not_add": _case(sentence_piece, "llama", **LLAMA, add_bos_token=True),
    "llama2_special_tokens_only_in_their_map": TokenizerCase(
        lambda: sentence_piece(["<unk>"]),
        {
            "config.json": {"model_type": "llama"},
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
            "special_tokens_map.json": _MAP,
        },
    ),
    "mistral": _case(_llama2, "mistral", **LLAMA, legacy=False, add_prefix_space=False),
    "metaspace_first": _case(lambda: metaspace("first"), "llama", **FAST, bos_token="<s>"),
    "metaspace_always": _case(lambda: metaspace("always"), "llama", **FAST, eos_token="</s>"),
    "metaspace_never": _case(lambda: metaspace("never"), "llama", **FAST),
    "ernie": _case(
        lambda: metaspace("never"), "ernie4_5", **LLAMA, legacy=True, extra_special_tokens={"image_token": "<image>"}
    ),
    "unigram": _case(unigram, "llama", **FAST, eos_token="</s>"),
    "word_piece": _case(word_piece, "llama", **FAST, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"),
    "gemma": _case(
        lambda: sentence_piece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]),
        "llama",
        tokenizer_class="GemmaTokenizer",
    ),
    "gpt_neox_drops_the_files_bos": _case(
        lambda: with_template(_with_added(_plain(), "<|endoftext|>"), "<|endoftext|> $A", "<|endoftext|>"),
        "llama",
        tokenizer_class="GPTNeoXTokenizer",
        add_bos_token=True,
    ),
    "cohere": _case(
        lambda: _with_added(_plain(), "<BOS_TOKEN>", "<UNK>"), "llama", tokenizer_class="CohereTokenizerFast"
    ),
    "code_llama": _case(
        lambda: sentence_piece(["<unk>", "<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>"]),
        "llama",
        tokenizer_class="CodeLlamaTokenizer",
    ),
    "added_tokens_with_flags": _case(
        _plain,
        "llama",
        **FAST,
        added_tokens_decoder=_next(
            _plain,
            _added("<mark>", lstrip=True, rstrip=True),
            _added("MARK", single_word=True, normalized=True),
            _added("<extra>", special=True, rstrip=True),
        ),
        bos_token="<extra>",
    ),
    "added_tokens_of_the_older_file": TokenizerCase(
        _plain,
        {
            "config.json": {"model_type": "llama"},
            "tokenizer_config.json": {**FAST, "eos_token": "<mark>"},
            "added_tokens.json": {"<mark>": _end(_plain), "<extra>": _end(_plain) + 1},
        },
    ),
    "special_tokens_only_in_their_map": TokenizerCase(
        _plain, {"tokenizer_config.json": {**FAST, "eos_token": "<extra>"}, "special_tokens_map.json": _MAP}
    ),
    "special_tokens_map_beside_declared_tokens": TokenizerCase(
        _plain,
        {
            "tokenizer_config.json": {**FAST, "added_tokens_decoder": _next(_plain, _added("<extra>"))},
            "special_tokens_map.json": _MAP,
        },
    ),
    "extra_special_tokens_in_both_files": TokenizerCase(
        _plain,
        {
            "tokenizer_config.json": {**FAST, "extra_special_tokens": ["<mark>"]},
            "special_tokens_map.json": {
                "extra_special_tokens": [{"content": "<extra>", "lstrip": True}, "<image>", "<mark>"]
            },
        },
    ),
    "additional_special_tokens_in_both_files": TokenizerCase(
        _plain,
        {
            "tokenizer_config.json": {**FAST, "additional_special_tokens": ["<mark>"]},
            "special_tokens_map.json": {"additional_special_tokens": ["<extra>"], "tool_token": "<|tool|>"},
        },
    ),
    "extra_special_tokens_as_a_list": _case(
        _plain, "llama", **FAST, extra_special_tokens=["<extra>", "<image>"], bos_token="<s>"
    ),
    "extra_special_tokens_with_names": _case(
        _plain,
        "llama",
        **FAST,
        extra_special_tokens={"image_token": "<image>", "call_token": "<call>"},
        tool_token="<|tool|>",
        eos_token={"__type": "AddedToken", **_added("</s>", rstrip=True)},
    ),
    "special_tokens_are_split": _case(
        lambda: _with_added(_plain(), "<|endoftext|>"), "llama", **FAST, split_special_tokens=True
    ),
    "truncated_and_padded_in_the_file": _case(_padded, "llama", **FAST),
    "padded_in_a_file_that_is_rebuilt": _case(_padded, "llama", tokenizer_class="GPT2Tokenizer"),
    "the_file_alone": TokenizerCase(_llama3, {}),
}
"""Each of these is read alike by transformers and by us."""
