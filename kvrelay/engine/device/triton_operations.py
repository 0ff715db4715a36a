"""Operations by Triton's kernels, for a GPU, or interpreted in tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.kernels import activation, blocks, embedding, norm, quantize, rope_kv, sampling
from kvrelay.engine.device.kernels import decode_attention as decode
from kvrelay.engine.device.kernels import dense_attention as dense
from kvrelay.engine.device.kernels import prefill_attention as prefill
from kvrelay.engine.device.operations import MOST_LOGPROBS, OperationLimits, Quantized, Sampled, StepTensors
from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.kernels import HeadNorms, HeadShape, LayerKV

DECODE_TILINGS: tuple[tuple[int, decode.DecodeTiling], ...] = (
    (8, decode.DecodeTiling(splits=16, fewest=128, tile=128)),
    (16, decode.DecodeTiling(splits=4, fewest=256, tile=128)),
    (24, decode.DecodeTiling(splits=2, fewest=512, tile=128)),
    (32, decode.DecodeTiling(splits=2, fewest=512)),
    (48, decode.DecodeTiling(splits=2, fewest=512, tile=128)),
    (1 << 30, decode.DecodeTiling(splits=2, fewest=4096)),
)
"""How contexts are cut in a step of up to so many sequences: few sequences need many pieces to fill the device. Many
fill it by themselves, and only a context much longer than the others is cut, so that the step does not wait for it.
"""

_WIDEST = 128
"""Elements of a head up to which longer tiles fit into a multiprocessor's memory."""

_DENSE_DIMS = (16, 32, 64, 128)

MOST_GATHERED = 32768
"""Tokens of the room for gathered contexts at most: 128 MiB for 8 heads of 128 elements."""


class TritonOperations:
    """Operations of kernels. Tilings were chosen by ``scripts/gpu-check`` on an H200."""

    def __init__(self, framework: Framework, heads: HeadShape, limits: OperationLimits) -> None:
        self._framework = framework
        self._heads = heads
        self._limits = limits
        self._exact = limits.dtype == "float32"
        self.prefill_tiling = prefill.EXACT if self._exact else prefill.FAST
        self.decode_tilings = DECODE_TILINGS
        self.sampling_tiling = sampling.SamplingTiling()
        self.tile_rows = self.prefill_tiling.rows
        self.dense_tiling = dense.DenseTiling()
        self.room = self._dense_room()
        cosine, sine = heads.rotation.half_tables(np.arange(limits.max_model_len))
        self._cosine = framework.upload(cosine, "float32")
        self._sine = framework.upload(sine, "float32")
        self._gathered: Tensor | None = None
        self._scratch: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _dense_room(self) -> DenseRoom | None:
        """Return where contexts are gathered, None if the kernel for that cannot compute these heads."""
        dim, piece = self._heads.head_dim, self.dense_tiling.tile
        capacity = min(self._limits.gathered, MOST_GATHERED) // piece * piece
        fits = dim in _DENSE_DIMS and not self._exact
        fewest = self._limits.gathered_from
        return DenseRoom(capacity, fewest, piece) if fits and capacity >= fewest else None

    def embed(self, step: StepTensors, last_tokens: Tensor, table: Tensor) -> Tensor:
        out = self._framework.empty((step.shape.rows, table.shape[1]), self._limits.dtype)
        embedding.embed(step.tokens, step.table_rows, last_tokens, table, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        count = x.shape[0] if rows is None else rows.shape[0]
        out = self._framework.empty((count, x.shape[1]), self._limits.dtype)
        norm.rms_norm(x, weight, out, eps, rows)
        return out

    def broken_rows(self, x: Tensor) -> Tensor:
        out = self._framework.empty((x.shape[0],), "int32")
        norm.broken_rows(x, out)
        return out

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, step: StepTensors, layer: LayerKV
    ) -> Tensor:
        shape = (step.shape.rows, self._heads.num_heads, self._heads.head_dim)
        queries = self._framework.empty(shape, self._limits.dtype)
        rope_kv.apply_rope_and_write_kv(
            qkv, norms, eps, self._cosine, self._sine, step.positions, step.slots, queries, layer.keys, layer.values
        )
        return queries

    def attention(
        self, queries: Tensor, layer: LayerKV, step: StepTensors, tables: Tensor, window: int | None
    ) -> Tensor:
        rows, decodes, tiles, _, dense_tiles, _ = step.shape
        out = self._framework.empty((rows, self._heads.num_heads, self._heads.head_dim), self._limits.dtype)
        size, exact = self._limits.block_size, self._exact
        if decodes:
            most, tiling = self._decode_tiling(decodes)
            decode.decode_attention(
                queries[:decodes], layer.keys, layer.values, step.positions, step.table_rows, tables, out,
                self._scratch_for(most, tiling), size, window, exact, tiling,
            )  # fmt: skip
        if tiles:
            prefill.prefill_attention(
                queries, layer.keys, layer.values, step.tiles, tables, out, size, window, exact, self.prefill_tiling
            )
        if dense_tiles:
            room = self._gathered_room()
            gathered = room[0], room[1]
            dense.gather(layer.keys, layer.values, step.pieces, tables, gathered, size, self.dense_tiling.tile)
            dense.dense_attention(queries, gathered, step.dense_tiles, out, self.dense_tiling)
        return out.view(rows, -1)

    def _gathered_room(self) -> Tensor:
        """Return the memory of the room, one after the other for all layers: [2, capacity, G, D]."""
        if self._gathered is None and self.room is not None:
            shape = (2, self.room.capacity, self._heads.num_kv_heads, self._heads.head_dim)
            self._gathered = self._framework.empty(shape, self._limits.dtype)
        return self._gathered

    def _decode_tiling(self, decodes: int) -> tuple[int, decode.DecodeTiling]:
        """Return how contexts are cut in a step of ``decodes`` sequences, and of how many it may be at most."""
        most, tiling = next(one for one in self.decode_tilings if decodes <= one[0])
        if self._exact:
            return most, replace(tiling, tile=32, num_stages=2)
        return most, tiling if self._heads.head_dim <= _WIDEST else replace(tiling, tile=64)

    def _scratch_for(self, most: int, tiling: decode.DecodeTiling) -> tuple[Tensor, Tensor, Tensor]:
        """Return the room for pieces: the same for every step that is cut this way, so graphs may hold on to it."""
        if most not in self._scratch:
            rows = min(most, self._limits.max_num_seqs)
            heads = self._heads
            parts, stats, tickets = decode.scratch_sizes(
                rows, heads.num_heads, heads.num_kv_heads, heads.head_dim, tiling.splits
            )
            make = self._framework
            room = make.empty((parts,), "float32"), make.empty((stats,), "float32"), make.zeros((tickets,), "int32")
            self._scratch[most] = room
        return self._scratch[most]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out = self._framework.empty((gate_up.shape[0], gate_up.shape[1] // 2), self._limits.dtype)
        activation.silu_mul(gate_up, out)
        return out

    def quantized(self, x: Tensor) -> Quantized:
        return quantized_rows(self._framework, x)

    def quantized_norm(self, residual: Tensor, due: Tensor | None, weight: Tensor, eps: float) -> Quantized:
        out = _float8_rows(self._framework, *residual.shape)
        quantize.add_norm_quantize(residual, due, weight, eps, *out)
        return out

    def quantized_silu_mul(self, gate_up: Tensor) -> Quantized:
        out = _float8_rows(self._framework, gate_up.shape[0], gate_up.shape[1] // 2)
        quantize.silu_mul_quantize(gate_up, *out)
        return out

    def sample(self, logits: Tensor, step: StepTensors, last_tokens: Tensor) -> Sampled:
        make, count = self._framework, logits.shape[0]
        room = make.empty((count, self.sampling_tiling.room(logits.shape[1])), "float32")
        sampled = self._room_for_sampled(count)
        sampling.sample(
            logits, room, step.reals, step.numbers, (step.adjusted_tokens, step.changes), step.masks, last_tokens,
            *sampled,
            self.sampling_tiling,
        )  # fmt: skip
        return sampled

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num_alternatives: int) -> Sampled:
        scored = self._room_for_sampled(logits.shape[0])
        sampling.prompt_logprobs(logits, targets, num_alternatives, *scored, self.sampling_tiling)
        return scored

    def _room_for_sampled(self, count: int) -> Sampled:
        make, width = self._framework, 1 + MOST_LOGPROBS
        return Sampled(
            make.empty((count,), "int32"), make.empty((count, width), "int32"), make.empty((count, width), "float32")
        )

    def set_entries(self, table: Tensor, entries: Tensor) -> None:
        blocks.set_entries(table, entries)


def quantized_rows(framework: Framework, x: Tensor) -> Quantized:
    """Return ``x`` [N, width] in float8: rows of a step, or a weight."""
    out = _float8_rows(framework, *x.shape)
    quantize.quantize(x, *out)
    return out


def _float8_rows(framework: Framework, count: int, width: int) -> Quantized:
    return Quantized(framework.empty((count, width), "float8_e4m3"), framework.empty((count, 1), "float32"))
