"""Kernels made of Paddle operators. They run wherever Paddle runs, in float32 on a CPU.

Attention is a plain matmul, softmax, matmul: Paddle's ``scaled_dot_product_attention`` takes a hundred times as long
on a CPU. Keys and values are gathered token by token in head-major order, which costs no transposition afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch, Span
from kvrelay.engine.int8 import LARGEST, Quantization, rounded_rows
from kvrelay.engine.kernels import HeadNorms, HeadShape, LayerKV, PackedLinear, Tensor
from kvrelay.engine.kv_pool import MappedPool
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.prompt_logprobs import PromptRows, logprobs_of
from kvrelay.engine.rope import rotation_tables
from kvrelay.engine.sampler import sample_step
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs

Int64 = npt.NDArray[np.int64]

_MASKED = -1e30
_MAX_SCORES = 1 << 21
_LONGEST_TILE = 256
_SMALLEST = 1e-30


class PackedWeight(NamedTuple):
    """A matrix [out, in] and an optional bias [out]. ``rounds_rows``: its input rows are rounded to int8."""

    weight: Tensor
    bias: Tensor | None
    rounds_rows: bool


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries of ``num_seqs`` sequences, ``num_queries`` each, in consecutive rows; computed in one operation.

    ``slot_rows`` [num_seqs, G, T]: where each head of each context token lies in the pool seen as [slots * G, D].
    ``mask`` is added to the scores seen as [num_seqs * H * num_queries / len(mask), *mask.shape]; None if nothing is
    masked.
    """

    first_row: int
    num_seqs: int
    num_queries: int
    slot_rows: Tensor
    mask: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.num_seqs * self.num_queries


@dataclass(frozen=True, slots=True)
class PortableStep:
    """A step's tokens and their RoPE tables, its slots and the rows to write there (None: all), and its tiles in row
    order for each window in use.
    """

    token_ids: Tensor
    cosine: Tensor
    sine: Tensor
    slot_mapping: Tensor
    written_rows: Tensor | None
    tiles: dict[int | None, list[_Tile]]


class PortableKernels:
    """Kernels made of Paddle operators, for ``num_heads`` query and ``num_kv_heads`` key/value heads.

    Quantized weights and rows are rounded to int8 and multiplied in ``dtype``: equal results, but not faster.
    """

    def __init__(self, dtype: str, shape: HeadShape, quantization: Quantization = Quantization.NONE) -> None:
        self.dtype = self.kv_dtype = dtype
        self._quantization = quantization
        self._rotation = shape.rotation
        self._num_heads = shape.num_heads
        self._num_kv_heads = shape.num_kv_heads
        self._head_dim = shape.head_dim
        self._scale = shape.head_dim**-0.5

    def map_pool(self, memory: KVMemory) -> MappedPool:
        return MappedPool(memory)

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """A float32 array is shared on a CPU. It must be writable and may be uploaded only once."""
        if array.dtype != np.float32:
            return paddle.to_tensor(array)
        if self.dtype == "float32" and paddle.get_device() == "cpu":
            return paddle.from_dlpack(array)
        return paddle.to_tensor(array).cast(self.dtype)

    def pack_table(self, table: Tensor) -> Tensor:
        return table

    def pack_norm(self, weight: Tensor) -> Tensor:
        return weight

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> PackedLinear:
        weight, rounds_rows = self._rounded(weight, never_quantize)
        return PackedWeight(weight, bias, rounds_rows)

    def _rounded(self, weight: Tensor, never_quantize: bool) -> tuple[Tensor, bool]:
        """Return ``weight`` as quantization leaves it, and whether it rounds the rows as well."""
        if never_quantize or self._quantization is Quantization.NONE:
            return weight, False
        rounded = rounded_rows(weight.cast("float32").numpy())
        return self.upload(rounded), self._quantization is Quantization.W8A8

    def begin_step(self, batch: RaggedBatch, windows: Sequence[int | None]) -> PortableStep:
        tables = rotation_tables(self._rotation, batch.positions, self._num_heads + self._num_kv_heads)
        cosine, sine = map(self.upload, tables)
        slots = {span.index: span.slots(0) for span in batch.spans}
        tiles = {window: self._tiles(batch.spans, slots, window) for window in set(windows)}
        written = None if batch.written_rows is None else paddle.to_tensor(batch.written_rows)
        token_ids, slot_mapping = paddle.to_tensor(batch.token_ids), paddle.to_tensor(batch.slot_mapping)
        return PortableStep(token_ids, cosine, sine, slot_mapping, written, tiles)

    def embed(self, step: PortableStep, table: Tensor) -> Tensor:
        return paddle.nn.functional.embedding(step.token_ids, table)

    def normalize(self, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Paddle's fused norm is not used: its CPU kernel executes AVX-512 instructions on any CPU."""
        exact = residual.cast("float32")
        factors = paddle.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        return exact.multiply(factors).cast(self.dtype).multiply_(weight)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        x = round_rows(x) if packed.rounds_rows else x
        out = paddle.matmul(x, packed.weight, transpose_y=True)
        return out if packed.bias is None else out.add_(packed.bias)

    def add_linear(self, x: Tensor, packed: PackedLinear, residual: Tensor) -> Tensor:
        return self.linear(x, packed).add_(residual)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        ffn = gate_up.shape[-1] // 2
        return paddle.nn.functional.silu(gate_up[:, :ffn]).multiply_(gate_up[:, ffn:])

    def logits(
        self, residual: Tensor, rows: npt.NDArray[np.int64], weight: Tensor, eps: float, head: PackedLinear
    ) -> npt.NDArray[np.float32]:
        picked = paddle.gather(residual, paddle.to_tensor(rows))
        logits = self.linear(self.normalize(picked, weight, eps), head)
        values: npt.NDArray[np.float32] = logits.cast("float32").numpy()
        return values

    def sample(
        self, logits: npt.NDArray[np.float32] | None, batch: Sequence[ScheduledSequence]
    ) -> list[SequenceOutcome]:
        return sample_step(logits, batch)

    def prompt_logprobs(self, logits: npt.NDArray[np.float32], rows: PromptRows) -> PromptLogprobs:
        return logprobs_of(logits, rows)

    def finite_rows(self, residual: Tensor) -> npt.NDArray[np.bool_]:
        finite: npt.NDArray[np.bool_] = paddle.isfinite(residual).all(-1).numpy()
        return finite

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, layer: LayerKV, step: PortableStep
    ) -> Tensor:
        heads, rotated = self._num_heads, self._num_heads + self._num_kv_heads
        split = rotated * self._head_dim
        query_keys = qkv[:, :split].reshape([-1, rotated, self._head_dim])
        values = qkv[:, split:].reshape([-1, self._num_kv_heads, self._head_dim])
        if norms is not None:
            queries = self.normalize(query_keys[:, :heads], norms.queries, eps)
            keys = self.normalize(query_keys[:, heads:], norms.keys, eps)
            query_keys = paddle.concat([queries, keys], 1)
        query_keys = self._turned(query_keys, step)
        self._write_kv(query_keys[:, heads:], values, layer, step)
        return query_keys[:, :heads]

    def _turned(self, heads: Tensor, step: PortableStep) -> Tensor:
        swapped = paddle.roll(heads, self._head_dim // 2, -1)
        return (heads * step.cosine).add_(swapped.multiply_(step.sine))

    def _write_kv(self, keys: Tensor, values: Tensor, layer: LayerKV, step: PortableStep) -> None:
        if step.written_rows is not None:
            if step.written_rows.shape[0] == 0:
                return
            keys, values = paddle.gather(keys, step.written_rows), paddle.gather(values, step.written_rows)
        paddle.scatter_(layer.keys, step.slot_mapping, keys)
        paddle.scatter_(layer.values, step.slot_mapping, values)

    def attention(self, queries: Tensor, layer: LayerKV, step: PortableStep, window: int | None) -> Tensor:
        keys = layer.keys.reshape([-1, self._head_dim])
        values = layer.values.reshape([-1, self._head_dim])
        outputs = [self._attend(queries, keys, values, tile) for tile in step.tiles[window]]
        return outputs[0] if len(outputs) == 1 else paddle.concat(outputs)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, tile: _Tile) -> Tensor:
        """Return [tile.num_rows, H * D] from all queries [N, H, D] and the layer's keys and values [slots * G, D]."""
        heads, groups, dim, count = self._num_heads, self._num_kv_heads, self._head_dim, tile.num_queries
        mine = queries[tile.first_row : tile.first_row + tile.num_rows] * self._scale
        if count > 1:
            mine = mine.transpose([1, 0, 2])
        mine = mine.reshape([tile.num_seqs, groups, heads // groups * count, dim])
        embedding = paddle.nn.functional.embedding
        scores = paddle.matmul(mine, embedding(tile.slot_rows, keys), transpose_y=True)
        if tile.mask is not None:
            scores = scores.reshape([-1, *tile.mask.shape]).add_(tile.mask).reshape(scores.shape)
        weights = paddle.nn.functional.softmax(scores, -1)
        out = paddle.matmul(weights, embedding(tile.slot_rows, values))
        if count > 1:
            out = out.reshape([heads, count, dim]).transpose([1, 0, 2])
        return out.reshape([tile.num_rows, heads * dim])

    def _tiles(self, spans: Sequence[Span], slots: dict[int, Int64], window: int | None) -> list[_Tile]:
        """Cut ``spans`` into tiles: decodes of similar context together, prompt chunks in pieces of bounded size."""
        groups: list[list[Span]] = []
        for span in (span for span in spans if span.num_tokens == 1):
            if groups and _visible(span, window) <= 2 * _visible(groups[-1][0], window) + 16:
                groups[-1].append(span)
            else:
                groups.append([span])
        tiles = [self._decode_tile(group, slots, window) for group in groups]
        for span in (span for span in spans if span.num_tokens > 1):
            tiles += self._prefill_tiles(span, slots[span.index], window)
        return tiles

    def _decode_tile(self, spans: Sequence[Span], context: dict[int, Int64], window: int | None) -> _Tile:
        """One query each of several sequences. Short contexts are padded with their own first slot, and masked."""
        longest = max(_visible(span, window) for span in spans)
        slots = np.empty((len(spans), longest), np.int64)
        mask = np.zeros((len(spans), self._num_heads, longest), np.float32)
        for row, span in enumerate(spans):
            visible = _visible(span, window)
            slots[row, :visible] = context[span.index][span.context_len - visible :]
            slots[row, visible:] = slots[row, 0]
            mask[row, :, visible:] = _MASKED
        padded = any(_visible(span, window) != longest for span in spans)
        flat = mask.reshape(-1, longest) if padded else None
        return self._tile(spans[0].first_row, 1, slots, flat)

    def _prefill_tiles(self, span: Span, slots: Int64, window: int | None) -> list[_Tile]:
        """Consecutive queries of one sequence, each tile with just the context it can see."""
        length = max(16, min(_LONGEST_TILE, _MAX_SCORES // (self._num_heads * span.context_len)))
        tiles = []
        for first in range(span.start, span.context_len, length):
            queries = np.arange(first, min(first + length, span.context_len))
            seen_from = 0 if window is None else max(0, first - window + 1)
            positions = np.arange(seen_from, queries[-1] + 1)
            hidden = positions > queries[:, None]
            if window is not None:
                hidden |= positions <= queries[:, None] - window
            mask = np.where(hidden, np.float32(_MASKED), np.float32(0))
            row = span.first_row + first - span.start
            tiles.append(self._tile(row, len(queries), slots[None, positions], mask))
        return tiles

    def _tile(
        self, first_row: int, num_queries: int, slots: npt.NDArray[np.int64], mask: npt.NDArray[np.float32] | None
    ) -> _Tile:
        groups = self._num_kv_heads
        slot_rows = slots[:, None, :] * groups + np.arange(groups)[None, :, None]
        return _Tile(
            first_row=first_row,
            num_seqs=len(slots),
            num_queries=num_queries,
            slot_rows=paddle.to_tensor(slot_rows),
            mask=None if mask is None else paddle.to_tensor(mask).cast(self.dtype),
        )


def _visible(span: Span, window: int | None) -> int:
    """Return how many positions the last token of ``span`` attends to."""
    return span.context_len if window is None else min(window, span.context_len)


def round_rows(x: Tensor) -> Tensor:
    """Return the rows of ``x`` rounded to int8 precision (see ``int8.rounded_rows``)."""
    furthest = paddle.abs(x).max(axis=-1, keepdim=True).clip(min=_SMALLEST)
    return paddle.round(x * (LARGEST / furthest)) * (furthest / LARGEST)
