"""The native CPU kernels: oneDNN for GEMMs, our own library for the rest, in bfloat16 or float32.

Operations write into buffers that are reused in every step. The residual stream, the QKV projection and logits
are float32; inputs of GEMMs and attention are ``dtype``. Sums are float32, in an order that depends only on the row.
A token's logits are therefore bit-identical in any batch and for any chunks of its prompt.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch
from kvrelay.engine.int8 import Quantization
from kvrelay.engine.kernels import HeadNorms, HeadShape, LayerKV
from kvrelay.engine.kv_pool import AddressedPool
from kvrelay.engine.native.library import AttentionCall, HeadsCall, NativeLibrary
from kvrelay.engine.native_linear import Int8Linear, NativeLinear, OwnLinear, QuantizedRows, SmallBatchGemm
from kvrelay.engine.onednn import ITEM_BYTES, Array, OneDNN, rows_with_padding, to_bfloat16
from kvrelay.engine.paddle_runtime import set_num_threads
from kvrelay.engine.prompt_logprobs import PromptRows, logprobs_of
from kvrelay.engine.rope import RotationTables
from kvrelay.engine.sampler import sample_step
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """``num_rows`` rows of ``width`` elements at the beginning of a buffer of the kernels."""

    address: int
    num_rows: int
    width: int


class Kept(NamedTuple):
    """A weight that is read without being packed."""

    address: int
    array: npt.NDArray[np.generic]

    @classmethod
    def of(cls, array: npt.NDArray[np.generic]) -> Kept:
        """Return ``array``, which must be contiguous."""
        return cls(array.ctypes.data, array)


class _Buffer:
    """Rows of ``width`` elements of ``item_bytes``, as many as a step has ever needed."""

    def __init__(self, width: int, item_bytes: int) -> None:
        self._width = width
        self._row_bytes = width * item_bytes
        self._capacity = 0
        self.array = Array(0)

    def rows(self, count: int) -> Rows:
        """Return ``count`` rows, with room behind them for GEMMs to be padded."""
        if count > self._capacity:
            self._capacity = rows_with_padding(max(count, min(2 * self._capacity, 1024)))
            self.array = Array(self._capacity * self._row_bytes)
        return Rows(self.array.address, count, self._width)


@dataclass(frozen=True, slots=True)
class NativeStep:
    """One step as the library takes it. What has addresses in use is held here: ``batch`` and ``arrays``."""

    batch: RaggedBatch
    heads: HeadsCall
    attention: AttentionCall
    arrays: tuple[npt.NDArray[np.generic], ...]


class NativeKernels:
    """The native Kernels. Not thread-safe; computes with ``threads`` threads."""

    def __init__(
        self,
        dtype: str,
        shape: HeadShape,
        block_size: int,
        onednn: OneDNN,
        library: NativeLibrary,
        threads: int,
        quantization: Quantization = Quantization.NONE,
    ) -> None:
        self.dtype = self.kv_dtype = dtype
        self._bf16 = int(dtype == "bfloat16")
        self._item_bytes = ITEM_BYTES[dtype]
        self._shape = shape
        self._block_size = block_size
        self._onednn = onednn
        self._library = library
        self._threads = threads
        self._thread: int | None = None
        self._quantization = quantization
        self._small_batch_gemm = SmallBatchGemm(library)
        self._quantized_rows = QuantizedRows(library)
        self._rotation = RotationTables(shape.rotation)
        self._buffers: dict[tuple[str, int, int], _Buffer] = {}
        self._sequences = np.empty((0, 4), np.int64)
        self._width = 0

    def map_pool(self, memory: KVMemory) -> AddressedPool:
        return AddressedPool(memory)

    def upload(self, array: Float32) -> Float32:
        return np.ascontiguousarray(array, np.float32)

    def pack_table(self, table: Float32) -> Kept:
        self._width = table.shape[1]
        return Kept.of(to_bfloat16(table) if self._bf16 else table)

    def pack_norm(self, weight: Float32) -> Kept:
        return Kept.of(weight)

    def pack_linear(
        self, weight: Float32, bias: Float32 | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> NativeLinear:
        self._use_threads()
        out_dtype = "float32" if fp32_output else self.dtype
        if never_quantize or self._quantization is Quantization.NONE:
            if self.dtype == "float32" and self._library.owns_floats:
                return OwnLinear(self._library, weight, bias)
            return self._small_batch_gemm.joined(self._onednn.pack(weight, bias, self.dtype, out_dtype))
        rows = self._quantized_rows
        return Int8Linear(self._library, weight, bias, self._quantization, self.dtype, out_dtype, rows)

    def begin_step(self, batch: RaggedBatch, windows: Sequence[int | None]) -> NativeStep:
        self._use_threads()
        shape, spans = self._shape, batch.spans
        cosine, sine = self._rotation.up_to(int(batch.positions.max()) + 1)
        if len(spans) > len(self._sequences):
            self._sequences = np.empty((2 * len(spans), 4), np.int64)
        sequences = self._sequences
        sequences[: len(spans)] = [
            (span.first_row, span.num_tokens, span.start, span.block_table.ctypes.data) for span in spans
        ]
        slots = batch.slot_mapping
        if batch.written_rows is not None:
            slots = np.full(len(batch.token_ids), -1, np.int64)
            slots[batch.written_rows] = batch.slot_mapping
        sizes = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        heads = HeadsCall(
            cosine=cosine.ctypes.data,
            sine=sine.ctypes.data,
            positions=batch.positions.ctypes.data,
            slots=slots.ctypes.data,
            num_rows=len(batch.token_ids),
            bf16=self._bf16,
            **sizes,
        )
        attention = AttentionCall(
            sequences=sequences.ctypes.data,
            num_sequences=len(spans),
            block_size=self._block_size,
            scale=shape.head_dim**-0.5,
            bf16=self._bf16,
            **sizes,
        )
        return NativeStep(batch, heads, attention, (slots, sequences, cosine, sine))

    def embed(self, step: NativeStep, table: Kept) -> Rows:
        ids = step.batch.token_ids
        out = self._rows("residual", len(ids), self._width, 4)
        self._library.embed(ids.ctypes.data, table.address, out.address, len(ids), self._width, self._bf16)
        return out

    def normalize(self, residual: Rows, weight: Kept, eps: float) -> Rows:
        return self._normalize(residual, None, residual.num_rows, weight, eps)

    def _normalize(self, residual: Rows, picked: int | None, count: int, weight: Kept, eps: float) -> Rows:
        out = self._rows("hidden", count, self._width, self._item_bytes)
        self._library.rms_norm(
            residual.address, picked, weight.address, out.address, count, self._width, eps, self._bf16
        )
        return out

    def linear(self, x: Rows, packed: NativeLinear) -> Rows:
        out = self._rows("linear", x.num_rows, packed.shape[1], ITEM_BYTES[packed.out_dtype])
        packed.multiply(x.address, out.address, x.num_rows)
        return out

    def add_linear(self, x: Rows, packed: NativeLinear, residual: Rows) -> Rows:
        packed.multiply(x.address, residual.address, x.num_rows, accumulate=True)
        return residual

    def apply_rope_and_write_kv(
        self, qkv: Rows, norms: HeadNorms | None, eps: float, layer: LayerKV, step: NativeStep
    ) -> Rows:
        call = step.heads
        out = self._rows("queries", qkv.num_rows, call.num_heads * call.head_dim, self._item_bytes)
        call.qkv, call.queries, call.eps = qkv.address, out.address, eps
        call.keys, call.values = layer
        if norms is not None:
            call.q_norm, call.k_norm = norms.queries.address, norms.keys.address
        self._library.heads(ctypes.byref(call))
        return out

    def attention(self, queries: Rows, layer: LayerKV, step: NativeStep, window: int | None) -> Rows:
        call = step.attention
        out = self._rows("attended", queries.num_rows, queries.width, self._item_bytes)
        call.queries, call.out, call.window = queries.address, out.address, window or 0
        call.keys, call.values = layer
        self._library.attention(ctypes.byref(call))
        return out

    def silu_mul(self, gate_up: Rows) -> Rows:
        ffn = gate_up.width // 2
        out = self._rows("activated", gate_up.num_rows, ffn, self._item_bytes)
        self._library.silu_mul(gate_up.address, out.address, gate_up.num_rows, ffn, self._bf16)
        return out

    def logits(self, residual: Rows, rows: Int64, weight: Kept, eps: float, head: NativeLinear) -> Float32:
        hidden = self._normalize(residual, rows.ctypes.data, len(rows), weight, eps)
        return self._on_host("linear", self.linear(hidden, head))

    def sample(self, logits: Float32 | None, batch: Sequence[ScheduledSequence]) -> list[SequenceOutcome]:
        return sample_step(logits, batch)

    def prompt_logprobs(self, logits: Float32, rows: PromptRows) -> PromptLogprobs:
        return logprobs_of(logits, rows)

    def finite_rows(self, residual: Rows) -> npt.NDArray[np.bool_]:
        finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(self._on_host("residual", residual)), axis=-1)
        return finite

    def _on_host(self, operation: str, rows: Rows) -> Float32:
        """Return float32 ``rows`` of an operation's buffer as an array: good until that is used again."""
        array = self._buffers[operation, rows.width, 4].array
        return array.bytes.view(np.float32)[: rows.num_rows * rows.width].reshape(rows.num_rows, rows.width)

    def _rows(self, operation: str, count: int, width: int, item_bytes: int) -> Rows:
        key = operation, width, item_bytes
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _Buffer(width, item_bytes)
        return buffer.rows(count)

    def _use_threads(self) -> None:
        """Have OpenMP use the configured threads: it keeps the number for each calling thread."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            set_num_threads(self._threads)
            self._library.set_num_threads(self._threads)
