"""What the golden data covers. ``scripts/make_golden`` computes it; the tests compare with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.engine.tiny import DiskDType, write_tiny_checkpoint

TOKENS_FILE = Path(__file__).parent / "tokens.json"
LOGITS_FILE = Path(__file__).parent / "logits.npz"

PROMPT_LENGTHS = (1, 15, 16, 17, 200, 1500)
NUM_OUTPUT_TOKENS = 64
LOGITS_AT = (0, 31, 63)
"""Output tokens whose logits are kept."""

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class GoldenCase:
    """A tiny checkpoint and the prompts it is asked to continue."""

    name: str
    arch: str
    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: DiskDType = "float32"
    prompt_lengths: tuple[int, ...] = (17, 200)
    num_output_tokens: int = NUM_OUTPUT_TOKENS
    max_shard_bytes: int | None = None
    max_model_len: int | None = None

    def write_checkpoint(self, path: Path, *, tokenizer: bool = True) -> None:
        """Write the case's checkpoint into ``path``."""
        write_tiny_checkpoint(
            path, self.arch, dtype=self.dtype, overrides=self.overrides, max_shard_bytes=self.max_shard_bytes,
            tokenizer=tokenizer,
        )  # fmt: skip


CASES = (
    GoldenCase("llama", "llama", prompt_lengths=PROMPT_LENGTHS),
    GoldenCase("mistral", "mistral", {"sliding_window": 100}, prompt_lengths=PROMPT_LENGTHS),
    GoldenCase("qwen2", "qwen2", prompt_lengths=PROMPT_LENGTHS),
    GoldenCase("qwen3", "qwen3", prompt_lengths=PROMPT_LENGTHS),
    GoldenCase("ernie4_5", "ernie4_5", prompt_lengths=PROMPT_LENGTHS),
    GoldenCase("llama_linear", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    GoldenCase("llama_llama3", "llama", {"rope_scaling": _LLAMA3}),
    GoldenCase("qwen2_yarn", "qwen2", {"rope_parameters": {**_YARN, "rope_theta": 50000.0}}),
    GoldenCase(
        "llama_dynamic",
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        prompt_lengths=(128,),
        num_output_tokens=1,
        max_model_len=128,
    ),
    GoldenCase("llama_biases", "llama", {"attention_bias": True, "mlp_bias": True}, dtype="bfloat16"),
    GoldenCase("ernie4_5_biases", "ernie4_5", {"use_bias": True, "tie_word_embeddings": False}, dtype="float16"),
    GoldenCase(
        "qwen2_windows",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "tie_word_embeddings": False},
        max_shard_bytes=200_000,
    ),
    GoldenCase(
        "qwen3_layer_types",
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_key_value_heads": 3,
            "attention_bias": True,
        },
    ),
)


def prompt(length: int, seed: int, vocab_size: int = 384) -> list[int]:
    """Return ``length`` token ids, the same ones for a ``seed`` whatever the versions of libraries are."""
    words = np.random.Generator(np.random.PCG64([length, seed])).integers(0, 1 << 16, length, np.uint16)
    return [int(word) % vocab_size for word in words]


@dataclass(frozen=True)
class Golden:
    """What transformers gives for one prompt; ``logits[i]`` belongs to output token ``logits_at[i]``."""

    case: GoldenCase
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    logits_at: list[int]
    logits: npt.NDArray[np.float32]


def load_golden(case: GoldenCase) -> Iterator[Golden]:
    """Return the golden data of ``case``, by prompt."""
    stored = json.loads(TOKENS_FILE.read_text())[case.name]
    with np.load(LOGITS_FILE) as logits:
        for length, entry in stored.items():
            at = [index for index in LOGITS_AT if index < case.num_output_tokens]
            tokens = prompt(int(length), entry["prompt_seed"])
            yield Golden(case, tokens, entry["output_token_ids"], at, logits[f"{case.name}/{length}"])
