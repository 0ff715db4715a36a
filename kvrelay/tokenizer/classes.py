"""The tokenizer classes of transformers: which one a checkpoint gets, and what it makes of ``tokenizer.json``.

Most checkpoints get ``TokenizersBackend``, which takes the file as it is. Some classes take vocabulary, merges and
post-processor of the file only, and have a normalizer, pre-tokenizer and decoder of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

Bpe = Callable[..., models.BPE]
"""Makes the BPE model of the file with further options."""
Builder = Callable[[Bpe, Mapping[str, Any]], Tokenizer]


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """What one class does. ``special_tokens``: those it has where ``tokenizer_config.json`` does not name them.

    ``build`` makes the pipeline anew; None keeps that of the file. ``begin``: whether ``bos_token`` begins a text; None
    leaves that to the file. ``plain_specials``: special tokens lose their other flags.
    """

    build: Builder | None = None
    special_tokens: Mapping[str, str | None] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    begin: bool | None = None
    plain_specials: bool = False


BACKEND = TokenizerClass()

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _metaspace(bpe: Bpe, scheme: str, *, strip: bool, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(bpe(fuse_unk=True, byte_fallback=True, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return tokenizer


def _llama(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    prefix = settings.get("add_prefix_space") is None or bool(settings["add_prefix_space"])
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    return _metaspace(bpe, scheme, strip=prefix)


def _code_llama(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    prefix = settings.get("add_prefix_space") is None or bool(settings["add_prefix_space"])
    unknown = settings.get("unk_token", "<unk>")
    return _metaspace(bpe, "first" if prefix else "never", strip=True, unk_token=_text(unknown))


def _gemma(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    unknown = _text(settings.get("unk_token", "<unk>"))
    tokenizer = Tokenizer(bpe(fuse_unk=True, byte_fallback=True, unk_token=unknown))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _byte_level(bpe: Bpe, *before: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(bpe(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(**options)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    return _byte_level(bpe, add_prefix_space=_prefixed(settings))


def _gpt_neox(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    return _byte_level(bpe, normalizer=normalizers.NFC(), add_prefix_space=_prefixed(settings))


def _cohere(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _byte_level(bpe, digits, normalizer=normalizers.NFC(), add_prefix_space=_prefixed(settings))


def _qwen2(bpe: Bpe, settings: Mapping[str, Any]) -> Tokenizer:
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    return _byte_level(bpe, words, normalizer=normalizers.NFC(), add_prefix_space=_prefixed(settings), use_regex=False)


def _prefixed(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("add_prefix_space"))


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_FILL = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>"}

CLASSES: dict[str, TokenizerClass] = {
    "LlamaTokenizer": TokenizerClass(_llama, _SENTENCE),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama,
        {**_SENTENCE, **_FILL, "fill_token": "<FILL_ME>"},
        extra_special_tokens=(*_FILL.values(), "<FILL_ME>"),
        begin=True,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2, dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"), plain_specials=True
    ),
    "GPT2Tokenizer": TokenizerClass(_gpt2, {**_TEXT, "pad_token": None}),
    "GPTNeoXTokenizer": TokenizerClass(_gpt_neox, {**_TEXT, "pad_token": "<|padding|>"}, begin=False),
    "GemmaTokenizer": TokenizerClass(
        _gemma,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "CohereTokenizer": TokenizerClass(
        _cohere,
        {
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "unk_token": "<UNK>",
            "sep_token": "<SEP>",
            "pad_token": "<PAD>",
            "cls_token": "<CLS>",
            "mask_token": "<MASK_TOKEN>",
        },
    ),
}
"""The classes that make a pipeline of their own, as far as they are known here."""

UNSUPPORTED = frozenset(
    """
    AlbertTokenizer BartTokenizer BarthezTokenizer BartphoTokenizer BertGenerationTokenizer
    BertJapaneseTokenizer BertTokenizer BertweetTokenizer BigBirdTokenizer BioGptTokenizer
    BlenderbotSmallTokenizer BlenderbotTokenizer ByT5Tokenizer CLIPTokenizer CTRLTokenizer CamembertTokenizer
    CanineTokenizer ClvpTokenizer CodeGenTokenizer ConvBertTokenizer CpmAntTokenizer CpmTokenizer
    DebertaTokenizer DebertaV2Tokenizer DiaTokenizer DistilBertTokenizer EsmTokenizer EsmcTokenizer
    FNetTokenizer FSMTTokenizer FlaubertTokenizer FunnelTokenizer GPTNeoXJapaneseTokenizer GPTSw3Tokenizer
    HerbertTokenizer LEDTokenizer LasrTokenizer LukeTokenizer M2M100Tokenizer MBart50Tokenizer MBartTokenizer
    MLukeTokenizer MPNetTokenizer MarianTokenizer MobileBertTokenizer MvpTokenizer MyT5Tokenizer NllbTokenizer
    NougatTokenizer OpenAIGPTTokenizer PLBartTokenizer PegasusTokenizer PerceiverTokenizer PhobertTokenizer
    ProphetNetTokenizer Qwen3_5Tokenizer ReformerTokenizer RemBertTokenizer RoCBertTokenizer RoFormerTokenizer
    RobertaTokenizer SeamlessM4TTokenizer Siglip2Tokenizer SiglipTokenizer Speech2TextTokenizer
    SpeechT5Tokenizer SplinterTokenizer SqueezeBertTokenizer T5Tokenizer TapasTokenizer UdopTokenizer
    VitsTokenizer WhisperTokenizer XGLMTokenizer XLMRobertaTokenizer XLMTokenizer XLNetTokenizer
    """.split()  # noqa: SIM905
)
"""Further classes with a pipeline of their own; any other name means that the file is taken as it is."""

_OF_MODEL_TYPE = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "mistral": "", "ernie4_5": ""}
"""What model types transformers has a class for; empty: the file as it is, whatever the checkpoint declares."""
_NOT_AS_DECLARED = ("qwen2", "ernie4_5")
"""Model types whose checkpoints declare so many wrong classes that transformers does not believe them."""


def class_name(declared: str | None, model_type: str | None, *, byte_level: bool) -> str:
    """Return the name of the class that ``AutoTokenizer`` takes, without ``Fast``; empty for the file as it is.

    ``declared``: ``tokenizer_class`` of the checkpoint. ``byte_level``: whether its ``tokenizer.json`` is.
    """
    registered = _OF_MODEL_TYPE.get(model_type or "")
    if declared is None:
        return registered or ""
    name = declared.removesuffix("Fast")
    if registered == "" or (name == "LlamaTokenizer" and byte_level and model_type not in _NOT_AS_DECLARED):
        return ""
    if registered is not None and model_type in _NOT_AS_DECLARED:
        return registered
    return name if name in CLASSES or name in UNSUPPORTED else ""
