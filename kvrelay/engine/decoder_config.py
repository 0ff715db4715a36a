"""The content of a checkpoint's ``config.json``. One decoder with flags covers all supported architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.checkpoint_files import eos_token_ids, finite_number, positive_integer, read_json_object
from kvrelay.engine.rope import RopeConfig
from kvrelay.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture differs from the others. A string names the key of ``config.json`` that holds a flag."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    interleaved_rope: bool = False
    windows: str = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_MISTRAL = Family(windows="all_layers")
_QWEN2 = Family(qkv_bias=True, windows="by_layer")
_QWEN3 = Family(
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    qk_norm=True,
    windows="by_layer",
    defaults={"head_dim": 128},
)
_ERNIE4_5 = Family(
    qkv_bias="use_bias",
    out_bias="use_bias",
    mlp_bias="use_bias",
    interleaved_rope=True,
    defaults={"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Ernie4_5ForCausalLM": _ERNIE4_5,
    "Ernie4_5_ForCausalLM": _ERNIE4_5,
}
"""Every architecture this engine runs, by the name ``config.json`` gives it."""

_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "sliding_window": 4096,
}
_ACTIVATIONS = ("silu", "swish")
_LAYER_TYPES = ("sliding_attention", "full_attention")
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape and flags of a decoder. ``windows[layer]``: how many positions a token attends to, its own included."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    interleaved_rope: bool
    tied_embeddings: bool

    @property
    def qkv_size(self) -> int:
        """Width of queries, keys and values of one token together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def read_decoder_config(model_dir: Path) -> DecoderConfig:
    """Return the config of the checkpoint in ``model_dir``. Raises CheckpointError."""
    return parse_decoder_config(read_json_object(model_dir / "config.json"))


def parse_decoder_config(data: Mapping[str, Any]) -> DecoderConfig:
    """Return ``data``, the content of a ``config.json``, as a DecoderConfig. Raises CheckpointError."""
    architecture, family = _family(data)
    values = {**_DEFAULTS, **family.defaults, **{key: value for key, value in data.items() if value is not None}}
    _refuse_unsupported(values)
    num_heads, hidden_size = positive_integer(values, "num_attention_heads"), positive_integer(values, "hidden_size")
    num_layers, max_length = (
        positive_integer(values, "num_hidden_layers"),
        positive_integer(values, "max_position_embeddings"),
    )
    if num_layers > _MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers should be at most {_MAX_LAYERS}, not {num_layers}")
    windows = _windows(family, values, data, num_layers)
    config = DecoderConfig(
        architecture=architecture,
        vocab_size=positive_integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive_integer(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=positive_integer({"num_key_value_heads": num_heads, **values}, "num_key_value_heads"),
        head_dim=positive_integer({"head_dim": hidden_size // num_heads, **values}, "head_dim"),
        rms_norm_eps=finite_number(values["rms_norm_eps"], "rms_norm_eps"),
        max_position_embeddings=max_length,
        rope=RopeConfig.parse(values, max_length, _layer_types(windows)),
        windows=windows,
        qkv_bias=_flag(family.qkv_bias, values),
        out_bias=_flag(family.out_bias, values),
        mlp_bias=_flag(family.mlp_bias, values),
        qk_norm=family.qk_norm,
        interleaved_rope=family.interleaved_rope,
        tied_embeddings=bool(values["tie_word_embeddings"]),
    )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{num_heads} attention heads are not a multiple of {config.num_kv_heads} KV heads, "
            f"or head_dim {config.head_dim} is odd"
        )
    return config


def read_eos_token_ids(model_dir: Path) -> list[int]:
    """Return the ids that end a text, from ``generation_config.json`` or else ``config.json``; none if neither says."""
    for name in ("generation_config.json", "config.json"):
        content = read_json_object(model_dir / name, required=False)
        if content.get("eos_token_id") is not None:
            return eos_token_ids(content, name)
    return []


def _family(data: Mapping[str, Any]) -> tuple[str, Family]:
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise CheckpointError(f"architecture {name!r:.80} is not supported; supported are {supported}")
    return name, FAMILIES[name]


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if values["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"activation {values['hidden_act']!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    if "quantization_config" in values:
        raise CheckpointError("quantized checkpoints are not supported (quantization_config in config.json)")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")


def _flag(flag: bool | str, values: Mapping[str, Any]) -> bool:
    return bool(values.get(flag, False)) if isinstance(flag, str) else flag


def _windows(
    family: Family, values: Mapping[str, Any], data: Mapping[str, Any], num_layers: int
) -> tuple[int | None, ...]:
    """Return the attention window of each layer; None attends to everything before it."""
    if family.windows == "all_layers":
        explicit_null = "sliding_window" in data and data["sliding_window"] is None
        return (None if explicit_null else positive_integer(values, "sliding_window"),) * num_layers
    if family.windows == "none" or not values.get("use_sliding_window", False):
        return (None,) * num_layers
    window = positive_integer(values, "sliding_window")
    first = finite_number(values["max_window_layers"], "max_window_layers")
    kinds = values.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise CheckpointError(
            f"layer_types should give sliding_attention or full_attention for each of {num_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_types(windows: tuple[int | None, ...]) -> set[str]:
    return {"full_attention" if window is None else "sliding_attention" for window in windows}
