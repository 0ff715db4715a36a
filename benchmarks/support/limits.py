"""Limits of this machine, measured now, and the work of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvrelay.engine.onednn import ITEM_BYTES, Array, to_bfloat16
from kvrelay.engine.paddle_runtime import set_num_threads
from kvrelay.engine.select_kernels import open_onednn

BEYOND_CACHE_BYTES = 256 << 20
SIZE, NUM_ROWS = 2048, 1024
"""Size of the GEMM that measures oneDNN's maximum: ``[NUM_ROWS, SIZE] x [SIZE, SIZE]``."""

ROUNDS = 9


class Limits(NamedTuple):
    """Of so many cores: multiplications in ``dtype`` as oneDNN does them at best, and reads beyond any cache."""

    gflops: float
    gb_s: float
    dtype: str = "bfloat16"


def fastest_dtype() -> str:
    """Return bfloat16 where this CPU multiplies it, else float32: what a bfloat16 checkpoint is computed in."""
    return "bfloat16" if open_onednn().supports_dtype("bfloat16") else "float32"


def measure_limits(threads: int) -> Limits:
    """Return the limits of ``threads`` cores, best of some rounds; with one thread by the thread's own time."""
    dtype = fastest_dtype()
    set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    weight = open_onednn().pack(rng.standard_normal((SIZE, SIZE), np.float32), None, dtype, "float32")
    values = rng.standard_normal(NUM_ROWS * SIZE, np.float32)
    x, out = Array(NUM_ROWS * SIZE * ITEM_BYTES[dtype]), Array(NUM_ROWS * SIZE * 4)
    x.bytes[:] = (to_bfloat16(values) if dtype == "bfloat16" else values).view(np.uint8)
    parts = np.array_split(np.ones(BEYOND_CACHE_BYTES // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as readers:
        each = map if threads == 1 else readers.map
        multiply_s, read_s = _best_of(
            [lambda: weight.multiply(x.address, out.address, NUM_ROWS), lambda: list(each(np.sum, parts))], clock
        )
    return Limits(2 * NUM_ROWS * SIZE**2 / multiply_s / 1e9, BEYOND_CACHE_BYTES / read_s / 1e9, dtype)


def _best_of(doings: list[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    """Return the shortest time of each, taken in turns."""
    best = [float("inf")] * len(doings)
    for _ in range(ROUNDS):
        for index, do in enumerate(doings):
            began = clock()
            do()
            best[index] = min(best[index], clock() - began)
    return best


@dataclass(frozen=True)
class ModelCost:
    """What computing with a decoder takes. Weights and KV have ``item_bytes`` an element."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    item_bytes: float = 2.0

    @property
    def width(self) -> int:
        """Of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        kv_width = self.num_kv_heads * self.head_dim
        return self.num_layers * self.hidden * (2 * self.width + 2 * kv_width + 3 * self.ffn)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 4 * self.num_layers * self.num_kv_heads * self.head_dim

    def prefill_gflop(self, num_tokens: int) -> float:
        """GEMMs of ``num_tokens``, causal attention among them and the head for the last."""
        attention = 2 * num_tokens**2 * self.width * self.num_layers
        return (2 * (num_tokens * self.layer_weights + self.head_weights) + attention) / 1e9

    def decode_gb(self, batch_size: int, context: int) -> float:
        """Weights once, the KV of all."""
        weights = (self.layer_weights + self.head_weights) * self.item_bytes
        return (weights + batch_size * context * self.kv_bytes) / 1e9

    def decode_gflop(self, batch_size: int, context: int) -> float:
        attention = 4 * context * self.width * self.num_layers
        return batch_size * (2 * (self.layer_weights + self.head_weights) + attention) / 1e9

    def prefill_s(self, num_tokens: int, limits: Limits) -> float:
        return self.prefill_gflop(num_tokens) / limits.gflops

    def decode_s(self, batch_size: int, context: int, limits: Limits) -> float:
        """The longer of reading and computing, as if each went on behind the other."""
        return max(
            self.decode_gb(batch_size, context) / limits.gb_s,
            self.decode_gflop(batch_size, context) / limits.gflops,
        )


QWEN2 = ModelCost(hidden=896, ffn=4864, num_heads=14, num_kv_heads=2, head_dim=64, num_layers=24, vocab_size=8192)
"""Of the preset ``qwen2-0.5b``."""
