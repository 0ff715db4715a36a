"""Each native kernel relative to its limit, measured in the same run: read and copy bandwidth, oneDNN's maximum.

Usage: python benchmarks/kernels.py [--threads 1] [--dtype bfloat16|float32] [--shape qwen2-0.5b|llama-8b]

The default type is bfloat16 if oneDNN has fast bfloat16 GEMMs on this CPU, else float32. If all float32 GEMMs are our
own, weights that bfloat16 represents exactly are measured too. A ratio is the share of the limit that is reached.
Limits and kernels alternate, and the best of all rounds counts. With one thread the CPU time of the thread is used, so
other processes affect the ratios only through caches and memory. Pin it:
``taskset -c 1 python benchmarks/kernels.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.limits import fastest_dtype

from kvrelay.engine.batch import BatchAssembler, RaggedBatch, StepLimits
from kvrelay.engine.int8 import Quantization
from kvrelay.engine.kernels import HeadShape, LayerKV
from kvrelay.engine.native.library import GemmKind
from kvrelay.engine.native_kernels import NativeKernels
from kvrelay.engine.native_linear import NativeLinear
from kvrelay.engine.onednn import Array, OneDNN
from kvrelay.engine.paddle_runtime import set_num_threads
from kvrelay.engine.rope import RopeConfig, Rotation, inverse_frequencies
from kvrelay.engine.select_kernels import open_library, open_onednn
from kvrelay.engine.sequences import EngineSequence, ScheduledSequence
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import RequestId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence
from kvrelay.protocol.request import SamplingParams

BLOCK_SIZE = 16
ROUNDS = 7
MIN_ROUND_S = 0.02
BEYOND_CACHE_BYTES = 256 << 20
CONTEXT = 2048
ONEDNN = "oneDNN's best"


class Shape(NamedTuple):
    """The sizes of one model."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


SHAPES = {"qwen2-0.5b": Shape(896, 4864, 14, 2, 64), "llama-8b": Shape(4096, 14336, 32, 8, 128)}
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass
class Measured:
    """A measured operation. ``work``: bytes or floating point operations per call."""

    name: str
    run: Callable[[], object]
    work: float
    limit: str = ""
    aim: float | None = None
    unit: str = "GB/s"
    seconds: list[float] = field(default_factory=list)

    def measure(self, clock: Callable[[], float]) -> None:
        count, start = 0, clock()
        while (elapsed := clock() - start) < MIN_ROUND_S or not count:
            self.run()
            count += 1
        self.seconds.append(elapsed / count)

    @property
    def rate(self) -> float:
        return self.work / min(self.seconds)


class Bench:
    """Kernels of one type on one model's shape, over weights and KV too large for any cache."""

    def __init__(self, shape: Shape, dtype: str, threads: int) -> None:
        self.shape, self.dtype, self.threads = shape, dtype, threads
        self.rng = np.random.default_rng(0)
        self.onednn: OneDNN = open_onednn()
        self.library = open_library()
        rotation = Rotation(*inverse_frequencies(RopeConfig(), shape.head_dim, 4 * CONTEXT))
        heads = HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, rotation)
        self.new_kernels = partial(NativeKernels, dtype, heads, BLOCK_SIZE, self.onednn, self.library, threads)
        self.all_kernels = {kind: self.new_kernels(kind) for kind in Quantization}
        self.kernels = self.all_kernels[Quantization.NONE]
        set_num_threads(threads)
        self.readers = ThreadPoolExecutor(threads)
        slot_bytes = 2 * shape.num_kv_heads * shape.head_dim * ITEM_BYTES[dtype]
        self.num_seqs = max(8, BEYOND_CACHE_BYTES // (slot_bytes * CONTEXT))
        self.num_blocks = self.num_seqs * CONTEXT // BLOCK_SIZE
        geometry = KVGeometry(1, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, dtype, "bench")
        self.memory = KVMemory.create(geometry, self.num_blocks)
        values = self.rng.integers(0x3F00, 0x3F80, self.memory.size_bytes // 2, np.uint16)  # 0.5 to 1, in both types
        self.memory.planes.reshape(-1)[:] = values.view(np.uint8)
        self.layer: LayerKV = self.kernels.map_pool(self.memory).layers[0]
        self.kept: list[Array] = []
        self.items: list[Measured] = []

    def add(self, name: str, run: Callable[[], object], work: float, limit: str = "", aim: float | None = None) -> None:
        unit = "GFLOP/s" if ONEDNN in (name, limit) else "GB/s"
        self.items.append(Measured(name, run, work, limit, aim, unit))

    def limits(self) -> None:
        source = np.ones(BEYOND_CACHE_BYTES // 8, np.uint64)
        target = np.zeros_like(source)
        parts = np.array_split(np.arange(len(source)), self.threads)
        cuts = [slice(part[0], part[-1] + 1) for part in parts]

        each = map if self.threads == 1 else self.readers.map

        def read() -> None:
            list(each(lambda cut: source[cut].sum(), cuts))

        def copy() -> None:
            list(each(lambda cut: np.copyto(target[cut], source[cut]), cuts))

        self.add("read", read, source.nbytes)
        self.add("copy (read and written)", copy, 2 * source.nbytes)
        size = 2048
        best = self.onednn.pack(self.weight(size, size), None, self.dtype, "float32")
        x, out = self.rows(1024, size, ITEM_BYTES[self.dtype]), self.rows(1024, size, 4)
        self.add(ONEDNN, lambda: best.multiply(x, out, 1024), 2 * 1024 * size**2)

    def weight(self, size_in: int, size_out: int, holds: str = "float32") -> np.ndarray:
        values = self.rng.standard_normal((size_out, size_in), np.float32)
        return values if holds == "float32" else (values.view(np.uint32) & 0xFFFF0000).view(np.float32)

    def rows(self, count: int, width: int, item_bytes: int) -> int:
        """Return the address of that many rows, which are kept."""
        array = Array(count * width * item_bytes)
        values = self.rng.standard_normal(array.bytes.nbytes // 4, np.float32)
        if item_bytes == 2:
            values = np.repeat((values.view(np.uint32) >> 16).astype(np.uint16), 2)
        array.bytes[:] = values.view(np.uint8)[: array.bytes.nbytes]
        self.kept.append(array)
        return array.address

    def linears(self) -> None:
        shape = self.shape
        for size in [(shape.hidden, shape.qkv), (shape.hidden, 2 * shape.ffn), (shape.ffn, shape.hidden)]:
            self.linear(size, Quantization.NONE, (1, 8, 32, 509))
            if self.dtype == "float32" and self.library.owns_floats:
                self.linear(size, Quantization.NONE, (1, 8, 32, 509), holds="bfloat16")
        for kind in (Quantization.W8A16, Quantization.W8A8):
            needs = GemmKind.HALVES_BY_INT8 if self.dtype == "bfloat16" else GemmKind.FLOATS_BY_INT8
            if kind is Quantization.W8A8 or self.library.supports(needs):
                self.linear((shape.hidden, 2 * shape.ffn), kind, (1, 8, 32, 509))

    def linear(
        self, size: tuple[int, int], kind: Quantization, counts: tuple[int, ...], holds: str | None = None
    ) -> None:
        """Add GEMMs with so many weights that none is in cache, but for many rows, where that does not matter.

        ``holds``: the type that holds the weight exactly, that of compute if it is not given.
        """
        size_in, size_out = size
        holds = holds or self.dtype
        item_bytes = ITEM_BYTES[holds] if kind is Quantization.NONE else 1
        weight_bytes = size_in * size_out * item_bytes
        weight = self.weight(size_in, size_out, holds)
        num_weights = 1 + BEYOND_CACHE_BYTES // 2 // weight_bytes
        weights = [self.all_kernels[kind].pack_linear(weight, None, fp32_output=True) for _ in range(num_weights)]
        for count in counts:
            used = weights if count < 100 else weights[:2]
            x, out = self.rows(512, size_in, ITEM_BYTES[self.dtype]), self.rows(512, size_out, 4)
            work = len(used) * (weight_bytes if count == 1 else 2 * count * size_in * size_out)
            type_of = f" {holds}" if kind is Quantization.NONE else f" {kind}"
            name = f"linear{type_of} [{count}, {size_in}] x [{size_in}, {size_out}]"
            aim = 0.9 if count in (1, 509) and kind is Quantization.NONE else None
            self.add(name, partial(multiply_all, used, x, out, count), work, "read" if count == 1 else ONEDNN, aim)

    def batch(self, lengths: list[tuple[int, int]], order: np.ndarray) -> RaggedBatch:
        """Return a step that computes so many tokens after so many, on blocks in ``order``."""
        scheduled, first = [], 0
        for index, (count, start) in enumerate(lengths):
            num_blocks = -(-(start + count) // BLOCK_SIZE)
            new = NewSequence(
                id=SequenceId(index),
                request_id=RequestId(""),
                token_ids=[1] * (start + count),
                num_prompt_tokens=start + count,
                sampling=SamplingParams(max_tokens=1, seed=0),
                block_table=order[first : first + num_blocks].tolist(),
            )
            first += num_blocks
            scheduled.append(ScheduledSequence(EngineSequence(new), start, count, True, start))
        return BatchAssembler(StepLimits(BLOCK_SIZE, self.num_blocks, 4 * CONTEXT, vocab_size=2)).assemble(scheduled)

    def attention(self) -> None:
        shape, kernels, item_bytes = self.shape, self.kernels, ITEM_BYTES[self.dtype]
        width = shape.num_heads * shape.head_dim
        kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * item_bytes
        in_order, shuffled = np.arange(self.num_blocks), self.rng.permutation(self.num_blocks)
        decodes = [(1, CONTEXT - 1)] * self.num_seqs
        for name, lengths, order in (
            (f"decode attention, {self.num_seqs} x {CONTEXT}", decodes, in_order),
            (f"decode attention, {self.num_seqs} x {CONTEXT}, blocks anywhere", decodes, shuffled),
            (f"prefill attention, {CONTEXT} tokens", [(CONTEXT, 0)], shuffled),
        ):
            kernels = self.new_kernels()  # each is in the midst of a step
            step = kernels.begin_step(self.batch(lengths, order), [None])
            queries = kernels._rows("bench", len(step.batch.token_ids), width, item_bytes)
            kernels._buffers["bench", width, item_bytes].array.bytes[:] = 0x3C
            prefill = lengths[0][0] > 1
            pairs = CONTEXT * (CONTEXT + 1) / 2
            work = 4 * pairs * width if prefill else len(lengths) * CONTEXT * kv_bytes

            attend = partial(kernels.attention, queries, self.layer, step, None)
            self.add(name, attend, work, ONEDNN if prefill else "read", 0.5 if prefill else 0.7)

    def passes(self) -> None:
        """The passes between GEMMs, on 512 rows as in a prefill; in cache, so relative to a copy in cache."""
        shape, kernels, item_bytes = self.shape, self.kernels, ITEM_BYTES[self.dtype]
        norm = kernels.pack_norm(np.ones(shape.hidden, np.float32))
        kernels.pack_table(np.ones((4, shape.hidden), np.float32))
        count = 512
        residual = kernels._rows("residual", count, shape.hidden, 4)
        kernels._buffers["residual", shape.hidden, 4].array.bytes[:] = 0x3C
        gate_up = kernels._rows("gate_up", count, 2 * shape.ffn, item_bytes)
        kernels._buffers["gate_up", 2 * shape.ffn, item_bytes].array.bytes[:] = 0x3C
        norm_bytes, silu_bytes = count * shape.hidden * (4 + item_bytes), count * shape.ffn * 3 * item_bytes
        for name, size in (("copy as large as RMS norm", norm_bytes), ("copy as large as SiLU x up", silu_bytes)):
            source = np.ones(size // 16, np.uint64)
            target = np.zeros_like(source)
            self.add(name, partial(np.copyto, target, source), size)
        self.add("RMS norm", lambda: kernels.normalize(residual, norm, 1e-6), norm_bytes, "copy as large as RMS norm")
        self.add("SiLU x up", lambda: kernels.silu_mul(gate_up), silu_bytes, "copy as large as SiLU x up")

    def run(self) -> None:
        clock = time.thread_time if self.threads == 1 else time.perf_counter
        for one in self.items:
            one.run()
        for _ in range(ROUNDS):
            for one in self.items:
                one.measure(clock)


def multiply_all(weights: list[NativeLinear], x: int, out: int, count: int) -> None:
    for one in weights:
        one.multiply(x, out, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=list(ITEM_BYTES), default=fastest_dtype())
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2-0.5b")
    arguments = parser.parse_args()
    if not open_onednn().supports_dtype(arguments.dtype) and arguments.dtype == "bfloat16":
        sys.exit(f"--dtype bfloat16: oneDNN has no bf16 GEMMs on this CPU ({open_onednn().isa}); use float32")
    bench = Bench(SHAPES[arguments.shape], arguments.dtype, arguments.threads)
    bench.limits()
    bench.linears()
    bench.attention()
    bench.passes()
    bench.run()
    by_name = {one.name: one for one in bench.items}
    made_for = f"oneDNN for {bench.onednn.isa}, own code for {bench.library.isa}"
    title = f"{arguments.shape} in {arguments.dtype}, {arguments.threads} threads, {made_for}"
    table = Table("what", "best time", "rate", "of limit", "aim", title=title)
    missed = 0
    for one in bench.items:
        ratio = one.rate / by_name[one.limit].rate if one.limit else None
        missed += one.aim is not None and ratio is not None and ratio < one.aim
        table.add_row(
            one.name,
            f"{min(one.seconds) * 1e3:.3f} ms",
            f"{one.rate / 1e9:.1f} {one.unit}",
            "" if ratio is None else f"{ratio:.2f} of {one.limit}",
            "" if one.aim is None else f"{one.aim:.2f}",
        )
    Console(width=140).print(table)
    sys.exit(f"{missed} aims missed" if missed else 0)


if __name__ == "__main__":
    main()
