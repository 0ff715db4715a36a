"""What this machine can do at most, measured now, and what a model asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import kernels


class Limits(NamedTuple):
    """Of so many cores: multiplications as oneDNN does them at best, and reads beyond any cache."""

    gflops: float
    gb_s: float


def measure_limits(threads: int, dtype: str = "bfloat16") -> Limits:
    """Return the limits of ``threads`` cores, by the same code as ``benchmarks/kernels.py`` takes them."""
    bench = kernels.Bench(kernels.SHAPES["qwen2-0.5b"], dtype, threads)
    bench.limits()
    bench.run()
    rates = {one.name: one.rate / 1e9 for one in bench.items}
    return Limits(rates[kernels.ONEDNN], rates["read"])


@dataclass(frozen=True)
class ModelCost:
    """What computing with a decoder takes. Weights and KV have ``item_bytes`` an element."""

    shape: kernels.Shape
    num_layers: int
    vocab_size: int
    item_bytes: float = 2.0

    @property
    def layer_weights(self) -> int:
        shape = self.shape
        products = (shape.qkv + shape.num_heads * shape.head_dim + 3 * shape.ffn) * shape.hidden
        return self.num_layers * products

    @property
    def head_weights(self) -> int:
        return self.shape.hidden * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 4 * self.num_layers * self.shape.num_kv_heads * self.shape.head_dim

    def prefill_gflop(self, num_tokens: int) -> float:
        """Products of ``num_tokens``, causal attention among them and the head for the last."""
        width = self.shape.num_heads * self.shape.head_dim
        attention = 2 * num_tokens**2 * width * self.num_layers
        return (2 * (num_tokens * self.layer_weights + self.head_weights) + attention) / 1e9

    def decode_gb(self, batch_size: int, context: int) -> float:
        """Weights once, the KV of all."""
        weights = (self.layer_weights + self.head_weights) * self.item_bytes
        return (weights + batch_size * context * self.kv_bytes) / 1e9

    def decode_gflop(self, batch_size: int, context: int) -> float:
        attention = 4 * context * self.shape.num_heads * self.shape.head_dim * self.num_layers
        return batch_size * (2 * (self.layer_weights + self.head_weights) + attention) / 1e9

    def prefill_s(self, num_tokens: int, limits: Limits) -> float:
        return self.prefill_gflop(num_tokens) / limits.gflops

    def decode_s(self, batch_size: int, context: int, limits: Limits) -> float:
        """The longer of reading and computing, as if each went on behind the other."""
        return max(
            self.decode_gb(batch_size, context) / limits.gb_s,
            self.decode_gflop(batch_size, context) / limits.gflops,
        )


QWEN2 = ModelCost(kernels.SHAPES["qwen2-0.5b"], num_layers=24, vocab_size=8192)
"""Of the preset ``qwen2-0.5b``."""
