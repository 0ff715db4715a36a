"""Operations by torch's own operators: the references that kernels are compared with, and what runs on a CPU."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.operations import (
    MOST_LOGPROBS,
    NONE_LEFT,
    NOT_FINITE,
    OperationLimits,
    Quantized,
    Sampled,
    StepTensors,
)
from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.kernels import HeadNorms, HeadShape, LayerKV
from kvrelay.engine.sampler import GREEDY_BELOW

LARGEST = 448.0
"""The largest number of float8 e4m3."""


class TorchOperations:
    """Operations, of sequences one after the other. ``room``: for tests; contexts are read where they are."""

    tile_rows = 1 << 20
    room: DenseRoom | None = None

    def __init__(self, framework: Framework, heads: HeadShape, limits: OperationLimits) -> None:
        self._heads = heads
        self._block_size = limits.block_size
        cosine, sine = heads.rotation.half_tables(np.arange(limits.max_model_len))
        self._cosine = framework.upload(cosine, "float32")
        self._sine = framework.upload(sine, "float32")

    def embed(self, step: StepTensors, last_tokens: Tensor, table: Tensor) -> Tensor:
        sampled = last_tokens[step.table_rows.clamp(min=0)]
        tokens = torch.where(step.tokens < 0, sampled, step.tokens).clamp(min=0)
        return torch.nn.functional.embedding(tokens, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        wide = (x if rows is None else x[rows]).float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
        return wide.to(x.dtype)

    def broken_rows(self, x: Tensor) -> Tensor:
        return (~x.isfinite()).any(-1).int()

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, step: StepTensors, layer: LayerKV
    ) -> Tensor:
        heads, groups, dim = self._heads.num_heads, self._heads.num_kv_heads, self._heads.head_dim
        parts = qkv.view(-1, heads + 2 * groups, dim)
        queries, keys, values = parts.float().split([heads, groups, groups], 1)
        if norms is not None:
            queries = self.rms_norm(queries, norms.queries, eps)
            keys = self.rms_norm(keys, norms.keys, eps)
        low, high = torch.cat([queries, keys], 1).chunk(2, -1)
        cosine, sine = (table[step.positions][:, None] for table in (self._cosine, self._sine))
        turned = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1).to(qkv.dtype)
        written = step.slots >= 0
        slots = step.slots[written]
        layer.keys[slots] = turned[:, heads:][written]
        layer.values[slots] = values[written].to(qkv.dtype)
        return turned[:, :heads].contiguous()

    def attention(
        self, queries: Tensor, layer: LayerKV, step: StepTensors, tables: Tensor, window: int | None
    ) -> Tensor:
        out = torch.zeros_like(queries)
        positions, table_rows = step.positions.tolist(), step.table_rows.tolist()
        spans = [(row, 1, positions[row], table_rows[row]) for row in range(step.shape.decodes) if table_rows[row] >= 0]
        spans += [span for span in step.tiles.t().tolist() if span[1] > 0]
        if self.room is not None:
            gathered = step.pieces[0].tolist()
            for first_row, count, first, base in step.dense_tiles.t().tolist():
                spans.append((first_row, count, first, gathered[base // self.room.piece]))
        for first_row, count, first, table_row in spans:
            rows = slice(first_row, first_row + count)
            out[rows] = self._attend(queries[rows], layer, tables[table_row], first, window)
        return out.view(len(queries), -1)

    def _attend(self, queries: Tensor, layer: LayerKV, table: Tensor, first: int, window: int | None) -> Tensor:
        """Return attention of consecutive queries of one sequence [n, H, D], the first of them at ``first``."""
        count, size, groups = len(queries), self._block_size, self._heads.num_kv_heads
        position = torch.arange(first, first + count, device=queries.device)[:, None]
        context = torch.arange(first + count, device=queries.device)
        slots = table[context // size] * size + context % size
        keys, values = layer.keys[slots].float(), layer.values[slots].float()
        mine = queries.float().view(count, groups, -1, self._heads.head_dim)
        scores = torch.einsum("ngrd,tgd->grnt", mine, keys) * self._heads.head_dim**-0.5
        hidden = context > position
        if window is not None:
            hidden |= context <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("grnt,tgd->ngrd", weights, values).reshape(queries.shape).to(queries.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    def quantized(self, x: Tensor) -> Quantized:
        return quantized_rows(x)

    def quantized_norm(self, residual: Tensor, due: Tensor | None, weight: Tensor, eps: float) -> Quantized:
        if due is not None:
            residual.add_(due)
        return quantized_rows(self.rms_norm(residual.float(), weight, eps))

    def quantized_silu_mul(self, gate_up: Tensor) -> Quantized:
        return quantized_rows(self.silu_mul(gate_up.float()))

    def sample(self, logits: Tensor, step: StepTensors, last_tokens: Tensor) -> Sampled:
        count, width = len(logits), 1 + MOST_LOGPROBS
        sampled = Sampled(
            torch.zeros(count, dtype=torch.int32, device=logits.device),
            torch.zeros((count, width), dtype=torch.int32, device=logits.device),
            torch.zeros((count, width), dtype=torch.float32, device=logits.device),
        )
        for row in range(count):
            self._sample_row(logits[row], row, step, last_tokens, sampled)
        return sampled

    def _sample_row(self, logits: Tensor, row: int, step: StepTensors, last_tokens: Tensor, sampled: Sampled) -> None:
        uniform, temperature, top_p, min_p = step.reals[:, row].tolist()
        top_k, num_logprobs, table_row, begin, end, mask = step.numbers[:, row].tolist()
        token = NOT_FINITE
        if math.isfinite(logits.max()):  # NaN if any is
            adjusted = _adjusted(logits, step.adjusted_tokens[begin:end], step.changes[:, begin:end])
            if mask >= 0:
                bits = step.masks[mask, :, None] >> torch.arange(32, device=logits.device) & 1
                adjusted = adjusted.masked_fill(bits.view(-1)[: len(logits)] == 0, float("-inf"))
            token = int(adjusted.argmax()) if math.isfinite(adjusted.max()) else NONE_LEFT
        if token >= 0:
            if temperature >= GREEDY_BELOW:
                token = _draw(_filtered(adjusted, temperature, top_k, top_p, min_p), uniform)
            if num_logprobs >= 0:
                logprobs = logits.double().log_softmax(-1)
                order = torch.sort(logits, descending=True, stable=True).indices[:num_logprobs]
                sampled.top_tokens[row, 1 : 1 + num_logprobs] = order
                sampled.logprobs[row, 0] = logprobs[token]
                sampled.logprobs[row, 1 : 1 + num_logprobs] = logprobs[order]
        sampled.tokens[row] = token
        if table_row >= 0:
            last_tokens[table_row] = token

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num_alternatives: int) -> Sampled:
        count, width = len(logits), 1 + MOST_LOGPROBS
        ids = targets.long()[:, None]
        tops = torch.zeros((count, width), dtype=torch.int32, device=logits.device)
        values = torch.zeros((count, width), dtype=torch.float32, device=logits.device)
        order = torch.sort(logits, descending=True, stable=True).indices[:, :num_alternatives]
        logprobs = logits.double().log_softmax(-1)
        tops[:, 1 : 1 + num_alternatives] = order
        values[:, 0] = logprobs.gather(1, ids)[:, 0]
        values[:, 1 : 1 + num_alternatives] = logprobs.gather(1, order)
        ranks = (logits >= logits.gather(1, ids)).sum(-1)
        is_finite = logits.max(-1).values.isfinite()  # NaN if any is
        return Sampled(torch.where(is_finite, ranks, NOT_FINITE).int(), tops, values)

    def set_entries(self, table: Tensor, entries: Tensor) -> None:
        table.view(-1)[entries[0]] = entries[1]


def quantized_rows(x: Tensor) -> Quantized:
    """Return ``x`` [N, width] in float8, with the rounding of the kernels."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return Quantized((wide * (LARGEST / largest)).to(torch.float8_e4m3fn), largest / LARGEST)


def _adjusted(logits: Tensor, tokens: Tensor, changes: Tensor) -> Tensor:
    if not len(tokens):
        return logits
    bias, penalty, less = changes
    values = logits[tokens] + bias
    values = torch.where(values > 0, values / penalty, values * penalty).clamp(max=torch.finfo(values.dtype).max) - less
    adjusted = logits.clone()
    adjusted[tokens] = values
    return adjusted


def _filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return unnormalised probabilities in float64, as ``sampler`` filters them."""
    scaled = logits.double() / temperature
    weights = torch.exp(scaled - scaled.max())
    weights[weights < min_p] = 0.0
    if 0 < top_k < len(weights):
        weights[weights < torch.topk(weights, top_k).values[-1]] = 0.0
    if top_p < 1.0:
        highest = torch.sort(weights, descending=True).values
        last = int(torch.searchsorted(highest.cumsum(0), top_p * weights.sum()))
        weights[weights < highest[min(last, len(highest) - 1)]] = 0.0
    return weights


def _draw(weights: Tensor, uniform: float) -> int:
    cumulated = weights.cumsum(0)
    token = int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True))
    return min(token, int(weights.nonzero()[-1]))
