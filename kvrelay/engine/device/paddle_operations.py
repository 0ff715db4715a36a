"""Operations by Paddle's own operators: what runs on a CPU. They are those of ``torch_operations``."""

from __future__ import annotations

import math

import numpy as np

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.operations import MOST_LOGPROBS, NONE_LEFT, NOT_FINITE, OperationLimits, Sampled, StepTensors
from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.kernels import HeadNorms, HeadShape, LayerKV
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.sampler import GREEDY_BELOW

_LARGEST = float(np.finfo(np.float32).max)


class PaddleOperations:
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
        return table[paddle.where(step.tokens < 0, sampled, step.tokens).clamp(min=0)]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        wide = (x if rows is None else x[rows]).float()
        wide = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
        return wide.astype(x.dtype)

    def broken_rows(self, x: Tensor) -> Tensor:
        return (~x.isfinite()).any(-1).astype("int32")

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, step: StepTensors, layer: LayerKV
    ) -> Tensor:
        heads, groups, dim = self._heads.num_heads, self._heads.num_kv_heads, self._heads.head_dim
        parts = qkv.view([-1, heads + 2 * groups, dim])
        queries, keys, values = paddle.split(parts.float(), [heads, groups, groups], 1)
        if norms is not None:
            queries = self.rms_norm(queries, norms.queries, eps)
            keys = self.rms_norm(keys, norms.keys, eps)
        low, high = paddle.chunk(paddle.concat([queries, keys], 1), 2, -1)
        cosine, sine = (table[step.positions].unsqueeze(1) for table in (self._cosine, self._sine))
        turned = paddle.concat([low * cosine - high * sine, high * cosine + low * sine], -1).astype(qkv.dtype)
        written = step.slots >= 0
        if written.any():
            slots = step.slots[written]
            layer.keys[slots] = turned[:, heads:][written]
            layer.values[slots] = values[written].astype(qkv.dtype)
        return turned[:, :heads].contiguous()

    def attention(
        self, queries: Tensor, layer: LayerKV, step: StepTensors, tables: Tensor, window: int | None
    ) -> Tensor:
        out = paddle.zeros_like(queries)
        positions, table_rows = step.positions.tolist(), step.table_rows.tolist()
        spans = [[row, 1, positions[row], table_rows[row]] for row in range(step.shape.decodes) if table_rows[row] >= 0]
        spans += [span for span in step.tiles.numpy().T.tolist() if span[1] > 0]
        if self.room is not None and step.shape.dense_tiles:
            gathered = step.pieces[0].tolist()
            for first_row, count, first, base in step.dense_tiles.numpy().T.tolist():
                spans.append([first_row, count, first, gathered[base // self.room.piece]])
        for first_row, count, first, table_row in spans:
            rows = slice(first_row, first_row + count)
            out[rows] = self._attend(queries[rows], layer, tables[table_row], first, window)
        return out.view([queries.shape[0], -1])

    def _attend(self, queries: Tensor, layer: LayerKV, table: Tensor, first: int, window: int | None) -> Tensor:
        """Return attention of consecutive queries of one sequence [n, H, D], the first of them at ``first``."""
        count, size, groups = queries.shape[0], self._block_size, self._heads.num_kv_heads
        position = paddle.arange(first, first + count, dtype="int32").unsqueeze(1)
        context = paddle.arange(first + count, dtype="int32")
        slots = table[context // size] * size + context % size
        keys, values = layer.keys[slots].float(), layer.values[slots].float()
        mine = queries.float().view([count, groups, -1, self._heads.head_dim])
        scores = paddle.einsum("ngrd,tgd->grnt", mine, keys) * self._heads.head_dim**-0.5
        hidden = context > position
        if window is not None:
            hidden = hidden | (context <= position - window)
        weights = paddle.nn.functional.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        return paddle.einsum("grnt,tgd->ngrd", weights, values).reshape(queries.shape).astype(queries.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = paddle.chunk(gate_up.float(), 2, -1)
        return (paddle.nn.functional.silu(gate) * up).astype(gate_up.dtype)

    def sample(self, logits: Tensor, step: StepTensors, last_tokens: Tensor) -> Sampled:
        count, width = logits.shape[0], 1 + MOST_LOGPROBS
        sampled = Sampled(
            paddle.zeros([count], "int32"),
            paddle.zeros([count, width], "int32"),
            paddle.zeros([count, width], "float32"),
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
                bits = step.masks[mask].unsqueeze(-1) & _bits()
                is_banned = bits.reshape([-1])[: logits.shape[0]] == 0
                adjusted = paddle.where(is_banned, paddle.full_like(adjusted, -math.inf), adjusted)
            token = int(adjusted.argmax()) if math.isfinite(adjusted.max()) else NONE_LEFT
        if token >= 0:
            if temperature >= GREEDY_BELOW:
                token = _draw(_filtered(adjusted, temperature, top_k, top_p, min_p), uniform)
            if num_logprobs >= 0:
                logprobs = paddle.nn.functional.log_softmax(logits.double(), -1).astype("float32")
                order = paddle.argsort(logits, descending=True, stable=True)[:num_logprobs]
                sampled.logprobs[row, 0] = logprobs[token]
                if num_logprobs:
                    sampled.top_tokens[row, 1 : 1 + num_logprobs] = order.astype("int32")
                    sampled.logprobs[row, 1 : 1 + num_logprobs] = logprobs[order]
        sampled.tokens[row] = token
        if table_row >= 0:
            last_tokens[table_row] = token

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num_alternatives: int) -> Sampled:
        count, width = logits.shape[0], 1 + MOST_LOGPROBS
        ids = targets.astype("int64").unsqueeze(1)
        tops = paddle.zeros([count, width], "int32")
        values = paddle.zeros([count, width], "float32")
        logprobs = paddle.nn.functional.log_softmax(logits.double(), -1).astype("float32")
        values[:, 0] = paddle.take_along_axis(logprobs, ids, 1)[:, 0]
        if num_alternatives:
            order = paddle.argsort(logits, axis=-1, descending=True, stable=True)[:, :num_alternatives]
            tops[:, 1 : 1 + num_alternatives] = order.astype("int32")
            values[:, 1 : 1 + num_alternatives] = paddle.take_along_axis(logprobs, order, 1)
        ranks = (logits >= paddle.take_along_axis(logits, ids, 1)).astype("int32").sum(-1).astype("int32")
        is_finite = (logits < math.inf).all(-1) & (logits.max(-1) > -math.inf)
        return Sampled(paddle.where(is_finite, ranks, paddle.full_like(ranks, NOT_FINITE)), tops, values)

    def set_entries(self, table: Tensor, entries: Tensor) -> None:
        table.view([-1])[entries[0]] = entries[1]


def _bits() -> Tensor:
    """Return the 32 bits of a word, from the lowest on."""
    return paddle.bitwise_left_shift(paddle.ones([32], "int32"), paddle.arange(32, dtype="int32"))


def _adjusted(logits: Tensor, tokens: Tensor, changes: Tensor) -> Tensor:
    if not tokens.shape[0]:
        return logits
    bias, penalty, less = changes
    values = logits[tokens] + bias
    values = paddle.where(values > 0, values / penalty, values * penalty).clamp(max=_LARGEST) - less
    adjusted = logits.clone()
    adjusted[tokens] = values
    return adjusted


def _filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return unnormalised probabilities in float64, as ``sampler`` filters them."""
    scaled = logits.double() / temperature
    weights = paddle.exp(scaled - scaled.max())
    weights = _kept(weights, min_p)
    if 0 < top_k < weights.shape[0]:
        weights = _kept(weights, paddle.topk(weights, top_k)[0][-1])
    if top_p < 1.0:
        highest = paddle.sort(weights, descending=True)
        last = int((highest.cumsum(0) < top_p * weights.sum()).sum())
        weights = _kept(weights, highest[min(last, highest.shape[0] - 1)])
    return weights


def _kept(weights: Tensor, least: float | Tensor) -> Tensor:
    """Return ``weights`` with zero for those below ``least``."""
    return weights.masked_fill(weights < least, 0.0)


def _draw(weights: Tensor, uniform: float) -> int:
    cumulated = weights.cumsum(0)
    token = int((cumulated <= uniform * cumulated[-1]).sum())
    return min(token, int(weights.nonzero().max()))
