"""Checkpoints in Hugging Face layout: lists the tensors a checkpoint must have and reads them one by one.

``model.safetensors``, or shards listed in ``model.safetensors.index.json``, in float32, float16 or bfloat16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.checkpoint_files import read_json_object
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.safetensors_file import DTYPE_NAMES, StoredTensor, read_safetensors
from kvrelay.errors import CheckpointError

OnProgress = Callable[[int, int], None]
"""Called with (bytes read, total bytes) while a checkpoint is read."""

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]

_INDEX_NAME, _SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)
_LISTED_PROBLEMS = 8


def expected_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Return every tensor a checkpoint of ``config`` has, with its shape (matrices are [out, in])."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config.num_layers):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config)})
    return shapes


def _layer_shapes(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = [
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.out_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ]
    for name, out_size, in_size, bias in linears:
        yield f"{name}.weight", (out_size, in_size)
        if bias:
            yield f"{name}.bias", (out_size,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)


class Checkpoint:
    """The tensors of one checkpoint, checked against its config.

    Take each tensor once: taking it counts towards progress and the digest.
    """

    def __init__(self, config: DecoderConfig, tensors: dict[str, StoredTensor], on_progress: OnProgress) -> None:
        self.config = config
        self._tensors = tensors
        self._on_progress = on_progress
        self._bytes_total = sum(tensor.raw.nbytes for tensor in tensors.values())
        self._bytes_read = 0
        self._digests: dict[str, str] = {}

    @classmethod
    def open(cls, model_dir: Path, config: DecoderConfig, on_progress: OnProgress) -> Checkpoint:
        """Map the files of ``model_dir``; raise CheckpointError that names missing, unknown and misshapen tensors."""
        tensors: dict[str, StoredTensor] = {}
        for path in _shards(model_dir):
            tensors.update(read_safetensors(path))
        shapes = expected_shapes(config)
        harmless = {name for name in tensors if _is_harmless(name, config)}
        problems = _problems(shapes, {name: tensor.shape for name, tensor in tensors.items() if name not in harmless})
        if problems:
            more = len(problems) - _LISTED_PROBLEMS
            rest = [f"and {more} more"] if more > 0 else []
            raise CheckpointError(
                "; ".join([f"{model_dir} does not fit its config.json", *problems[:_LISTED_PROBLEMS], *rest])
            )
        return cls(config, {name: tensors[name] for name in shapes}, on_progress)

    @property
    def dtype(self) -> str:
        """The type its matrices are stored in."""
        return DTYPE_NAMES[self._tensors["model.embed_tokens.weight"].dtype]

    def has(self, name: str) -> bool:
        """Return whether this checkpoint has a tensor ``name``."""
        return name in self._tensors

    def take(self, name: str) -> Float32:
        """Return a tensor as float32. It may be read-only. The caller must not keep it."""
        return self.take_stored(name).float32()

    def take_stored(self, name: str) -> StoredTensor:
        """Return a tensor as it is in its file, read-only."""
        self._note(name)
        return self._tensors[name]

    def read_all(self) -> None:
        """Read every tensor for the digest only."""
        for name in self._tensors:
            self._note(name)

    def _note(self, name: str) -> None:
        tensor = self._tensors[name]
        self._digests[name] = f"{name} {tensor.dtype} {tensor.shape} {_xxh3(tensor.raw)}"
        self._bytes_read += tensor.raw.nbytes
        self._on_progress(self._bytes_read, self._bytes_total)

    def digest(self, *more: object) -> str:
        """Return the digest that identifies this model. All of its tensors must have been taken or read before.

        ``more``: other values that change the KV that the model computes.
        """
        lines = [repr(self.config), *map(repr, more), *(self._digests[name] for name in sorted(self._tensors))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _shards(model_dir: Path) -> list[Path]:
    """Return the files that hold the tensors."""
    index = model_dir / _INDEX_NAME
    if not index.exists():
        return [model_dir / _SINGLE_NAME]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map should be an object of names of files")
    return [model_dir / Path(name).name for name in sorted(set(weight_map.values()))]


def _is_harmless(name: str, config: DecoderConfig) -> bool:
    """Whether tensor ``name`` can be ignored: old files contain RoPE tables or a copy of tied embeddings."""
    return name.endswith(_HARMLESS_SUFFIXES) or (config.tied_embeddings and name == "lm_head.weight")


def _problems(expected: dict[str, Shape], found: dict[str, Shape]) -> list[str]:
    missing = [f"{name} {list(expected[name])} is missing" for name in expected if name not in found]
    unknown = [f"{name} {list(found[name])} is not part of the model" for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return missing + misshapen + unknown


def _xxh3(raw: npt.NDArray[np.generic]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data)
