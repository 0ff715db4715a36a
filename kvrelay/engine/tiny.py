"""Small random checkpoints in Hugging Face layout, with a tokenizer: models for tests and demonstrations.

The weights are computed from the integers of numpy's PCG64 generator, so a seed gives the same weights on all machines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from kvrelay.engine.checkpoint import Float32, expected_shapes
from kvrelay.engine.decoder_config import parse_decoder_config
from kvrelay.engine.safetensors_file import write_safetensors
from kvrelay.engine.tiny_tokenizer import BOS_ID, EOS_ID, MIN_VOCAB_SIZE, PAD_ID, write_tokenizer
from kvrelay.errors import ConfigError

DiskDType = Literal["float32", "float16", "bfloat16"]

_DEVIATION_OF_SUMS = 37837.22724161132
"""Of four integers below 2**16: 65536 / sqrt(3), written out so that no libm rounds it otherwise."""

_DISK_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Preset:
    """The size of a checkpoint. Matrices have standard deviation ``gain * 0.02``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    gain: float
    dtype: DiskDType


PRESETS: dict[str, Preset] = {
    "tiny": Preset(96, 192, 4, 6, 2, 16, 384, 4096, gain=8.0, dtype="float32"),
    "qwen2-0.5b": Preset(896, 4864, 24, 14, 2, 64, 8192, 32768, gain=1.0, dtype="bfloat16"),
}
"""``tiny``: its greedy tokens vary. ``qwen2-0.5b``: the shape of Qwen2-0.5B but for a vocabulary of 8192."""


@dataclass(frozen=True, slots=True)
class _Arch:
    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)


ARCHS: dict[str, _Arch] = {
    "qwen2": _Arch("Qwen2ForCausalLM", "qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "qwen3": _Arch("Qwen3ForCausalLM", "qwen3", {"tie_word_embeddings": True, "attention_bias": False}),
    "llama": _Arch("LlamaForCausalLM", "llama", {"attention_bias": False, "mlp_bias": False}),
    "mistral": _Arch("MistralForCausalLM", "mistral", {"sliding_window": None}),
    "ernie4_5": _Arch("Ernie4_5ForCausalLM", "ernie4_5", {"tie_word_embeddings": True, "use_bias": False}),
}
"""What ``--arch`` may be."""


def write_tiny_checkpoint(
    path: Path,
    arch: str,
    seed: int = 0,
    *,
    preset: str = "tiny",
    dtype: DiskDType | None = None,
    overrides: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: bool = True,
) -> None:
    """Write a random checkpoint of ``arch`` (one of ARCHS) into directory ``path``, which is created if needed.

    ``overrides`` replace keys of ``config.json``; ``max_shard_bytes`` splits the tensors over several files;
    without ``tokenizer`` there are no files of one. Raises ConfigError for an unknown ``arch`` or ``preset``.
    """
    config = tiny_config(arch, preset, overrides or {})
    on_disk = dtype or PRESETS[preset].dtype
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", {**config, "dtype": on_disk})
    _write_json(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    if tokenizer:
        write_tokenizer(path, config["vocab_size"])
    shapes = expected_shapes(parse_decoder_config(config))
    _write_shards(path, shapes, seed, PRESETS[preset].gain, on_disk, max_shard_bytes)


def tiny_config(arch: str, preset: str = "tiny", overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint. Raises ConfigError."""
    problems = [
        f"{key} {value!r} is unknown; there are {', '.join(known)}"
        for key, value, known in (("arch", arch, ARCHS), ("preset", preset, PRESETS))
        if value not in known
    ]
    if problems:
        raise ConfigError(problems)
    size, kind = PRESETS[preset], ARCHS[arch]
    config = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        **kind.config,
        **(overrides or {}),
    }
    if config["vocab_size"] < MIN_VOCAB_SIZE:
        raise ConfigError([f"vocab_size {config['vocab_size']} is below the tokenizer's {MIN_VOCAB_SIZE}"])
    return config


def random_tensor(name: str, shape: tuple[int, ...], seed: int, gain: float) -> Float32:
    """Return the values of tensor ``name``: norms around 1, all else around 0 with deviation ``gain * 0.02``.

    Each value is a sum of four 16-bit integers, close to a normal distribution and free of any libm's rounding.
    """
    key = [seed, xxhash.xxh3_64_intdigest(name.encode())]
    words = np.random.Generator(np.random.PCG64(key)).integers(0, 1 << 16, (4, int(np.prod(shape))), np.uint16)
    sums = words.sum(axis=0, dtype=np.int64) - 2 * 65535
    values: Float32 = (sums / _DEVIATION_OF_SUMS).astype(np.float32).reshape(shape)
    return 1 + np.float32(0.1) * values if "norm" in name else np.float32(gain * 0.02) * values


def _write_shards(
    path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, gain: float, dtype: DiskDType, limit: int | None
) -> None:
    shards = list(_shards(shapes, 4 if dtype == "float32" else 2, limit))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(
            path / file,
            {name: shapes[name] for name in names},
            _DISK_NAMES[dtype],
            lambda name: random_tensor(name, shapes[name], seed, gain),
        )
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, limit: int | None) -> Iterator[list[str]]:
    names: list[str] = []
    size_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = int(np.prod(shape)) * item_bytes
        if names and limit is not None and size_bytes + tensor_bytes > limit:
            yield names
            names, size_bytes = [], 0
        names.append(name)
        size_bytes += tensor_bytes
    yield names


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
