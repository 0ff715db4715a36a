"""Shapes of well-known models, to run with random weights: ``model.load_format: dummy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvrelay.engine.tiny_tokenizer import BOS_ID, EOS_ID, write_tokenizer
from kvrelay.errors import ConfigError

_QWEN2_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_QWEN3_8B: dict[str, Any] = {
    **_QWEN3_0_6B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
_LLAMA3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": _QWEN2_0_5B,
    "qwen3-0.6b": _QWEN3_0_6B,
    "llama3-8b": _LLAMA3_8B,
    "qwen3-8b": _QWEN3_8B,
}
"""The ``config.json`` of each preset."""


def write_shape(path: Path, preset: str) -> None:
    """Write what a node and the router need of a model without weights: its config and a tokenizer of its vocabulary.

    Raises ConfigError for an unknown ``preset``.
    """
    if preset not in SHAPES:
        raise ConfigError([f"preset {preset!r} is unknown; there are {', '.join(SHAPES)}"])
    config = {"hidden_act": "silu", **SHAPES[preset], "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "config.json", {**config, "dtype": "bfloat16"})
    _write(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    write_tokenizer(path, config["vocab_size"])


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
