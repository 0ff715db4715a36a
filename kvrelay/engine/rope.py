"""Rotary position embedding: the rotation speed of each pair of dimensions, for each kind of scaling.

The formulas are those of Hugging Face transformers, computed in float32 as it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.checkpoint_files import finite_number
from kvrelay.errors import CheckpointError

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One kind of RoPE with its numbers; those a kind does not use keep their defaults."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], max_position: int, layer_types: Collection[str] = ("full_attention",)
    ) -> RopeConfig:
        """Read ``rope_scaling`` or ``rope_parameters``, with ``rope_theta``, of a ``config.json``.

        ``layer_types``: the types of attention that the decoder has. Raises CheckpointError for an unknown kind, a
        missing number, or parameters that differ between these types: one rotation serves all layers.
        """
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        declared = values.get(name) or {}
        if not isinstance(declared, Mapping):
            raise CheckpointError(f"config.json: {name} should be an object, not {declared!r:.80}")
        if not any(isinstance(value, Mapping) for value in declared.values()):
            return cls._parse_one(values, declared, max_position)
        nested = [_of_layers(declared, name, layer_type) for layer_type in sorted(layer_types)]
        parsed = [cls._parse_one(values, scaling, max_position) for scaling in nested]
        if any(rope != parsed[0] for rope in parsed):
            raise CheckpointError(f"config.json: {name} differs between layers; only one RoPE for all is supported")
        return parsed[0]

    @classmethod
    def _parse_one(cls, values: Mapping[str, Any], scaling: Mapping[str, Any], max_position: int) -> RopeConfig:
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if not isinstance(kind, str) or kind not in KINDS:
            raise CheckpointError(f"rope kind {kind!r:.80} is not supported; supported are {', '.join(KINDS)}")
        if (scaling.get("partial_rotary_factor") or 1.0) != 1.0:
            raise CheckpointError("partial_rotary_factor other than 1 is not supported")
        known = {key: scaling[key] for key in _OPTIONAL if scaling.get(key) is not None}
        for key in {*known, *KINDS[kind].required}:
            if not isinstance(scaling.get(key), int | float):
                raise CheckpointError(f"rope kind {kind!r} needs a number {key}, not {scaling.get(key)!r:.80}")
        original = scaling.get("original_max_position_embeddings") or max_position
        if kind == "dynamic":
            original = max_position
        return cls(
            kind=kind,
            theta=finite_number(scaling.get("rope_theta") or values["rope_theta"], "rope_theta"),
            original_max_position=int(finite_number(original, "original_max_position_embeddings")),
            **known,
        )


def _of_layers(declared: Mapping[str, Any], name: str, layer_type: str) -> Mapping[str, Any]:
    """Return the parameters of the layers of ``layer_type``; flat ones beside the nested ones are their defaults."""
    nested = declared.get(layer_type)
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config.json: {name} has no parameters for {layer_type}, only for {', '.join(declared)}")
    return {**{key: value for key, value in declared.items() if not isinstance(value, Mapping)}, **nested}


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[Float32, float]:
    """Return the angle per position of each of the ``head_dim / 2`` pairs, and a factor for sine and cosine.

    ``max_model_len`` matters to kind ``dynamic`` only. transformers chooses its frequencies anew for the length of
    every forward pass, which makes keys depend on how a prompt was cut. Here they are those for a text of
    ``max_model_len`` tokens from the first to the last: equal to transformers' wherever that stays within the
    checkpoint's own length, and for a prompt of that very length.
    """
    return KINDS[rope.kind].compute(rope, head_dim, max_model_len)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of a head: the angle per position of each pair, and a factor for sine and cosine."""

    inverse: Float32
    factor: float

    def half_tables(self, positions: npt.NDArray[np.int64]) -> tuple[Float32, Float32]:
        """Return cosine and sine of each pair, each ``[len(positions), head_dim / 2]``."""
        angles = positions.astype(np.float32)[:, None] * self.inverse
        cosine, sine = np.cos(angles) * self.factor, np.sin(angles) * self.factor
        return cosine.astype(np.float32), sine.astype(np.float32)


class RotationTables:
    """The half tables of a Rotation by position, cached up to the largest position requested so far."""

    def __init__(self, rotation: Rotation) -> None:
        self._rotation = rotation
        self._tables = rotation.half_tables(np.arange(0))

    def up_to(self, end: int) -> tuple[Float32, Float32]:
        """Return cosine and sine of all positions below ``end``, or more."""
        if end > len(self._tables[0]):
            self._tables = self._rotation.half_tables(np.arange(max(end, 2 * len(self._tables[0]), 1024)))
        return self._tables


def rotation_tables(rotation: Rotation, positions: npt.NDArray[np.int64], num_heads: int) -> tuple[Float32, Float32]:
    """Return cosine and signed sine, each ``[len(positions), num_heads, head_dim]``, equal for all heads.

    A head x becomes ``x * cosine + swap(x) * sine`` where swap exchanges its two halves; the sine of the first half
    is negative.
    """
    cosine, sine = rotation.half_tables(positions)
    tables = np.concatenate([cosine, cosine], -1), np.concatenate([-sine, sine], -1)
    shape = (len(positions), num_heads, 2 * len(rotation.inverse))
    first, second = (np.ascontiguousarray(np.broadcast_to(table[:, None], shape), np.float32) for table in tables)
    return first, second


def half_split_order(head_dim: int) -> npt.NDArray[np.intp]:
    """Return the order of a head's rows that turns interleaved pairs (0, 1), (2, 3)... into two halves."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _plain(theta: float, head_dim: int) -> Float32:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _default(rope: RopeConfig, head_dim: int, _: int) -> tuple[Float32, float]:
    return _plain(rope.theta, head_dim), 1.0


def _linear(rope: RopeConfig, head_dim: int, _: int) -> tuple[Float32, float]:
    return _plain(rope.theta, head_dim) / np.float32(rope.factor), 1.0


def _dynamic(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[Float32, float]:
    """NTK scaling: a larger base, by how far the text is longer than what the model was trained for."""
    stretch = max(max_model_len, rope.original_max_position) / rope.original_max_position
    theta = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    return _plain(theta, head_dim), 1.0


def _llama3(rope: RopeConfig, head_dim: int, _: int) -> tuple[Float32, float]:
    """Llama 3: slow pairs rotate ``factor`` times slower, fast ones as before, those in between are blended."""
    inverse = _plain(rope.theta, head_dim)
    turns = rope.original_max_position / (2 * math.pi / inverse)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * inverse / rope.factor + blend * inverse).astype(np.float32), 1.0


def _yarn(rope: RopeConfig, head_dim: int, _: int) -> tuple[Float32, float]:
    """YaRN (arXiv 2309.00071): blend by how often a pair turns over the original length, and scale the attention."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slowed = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    inverse = _plain(rope.theta, head_dim)
    blended = inverse / rope.factor * slowed + inverse * (1 - slowed)
    return blended.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


@dataclass(frozen=True, slots=True)
class _Kind:
    compute: Callable[[RopeConfig, int, int], tuple[Float32, float]]
    required: tuple[str, ...] = ()


KINDS: dict[str, _Kind] = {
    "default": _Kind(_default),
    "linear": _Kind(_linear, ("factor",)),
    "dynamic": _Kind(_dynamic, ("factor",)),
    "llama3": _Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": _Kind(_yarn, ("factor",)),
}
"""Every kind of RoPE scaling this engine runs, by the name ``config.json`` gives it."""

_OPTIONAL = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
