"""The decoder: packed weights and one forward pass that covers every architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch
from kvrelay.engine.checkpoint import Checkpoint, Float32
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.kernels import AttentionPlan, Kernels, LayerKV, PackedLinear, Tensor
from kvrelay.engine.paddle_runtime import paddle
from kvrelay.engine.rope import half_split_order, inverse_frequencies, rotation_tables


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, with projections that read the same input joined into one matrix."""

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: PackedLinear
    post_attention_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a decoder. With tied embeddings ``lm_head`` is packed from ``embedding``."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    lm_head: PackedLinear


def load_weights(checkpoint: Checkpoint, kernels: Kernels) -> DecoderWeights:
    """Read every tensor of ``checkpoint`` and pack it for ``kernels``, one matrix at a time."""
    config = checkpoint.config
    embedding = _joined(checkpoint, kernels, ["model.embed_tokens.weight"])
    layers = [_load_layer(checkpoint, kernels, f"model.layers.{layer}.") for layer in range(config.num_layers)]
    final_norm = _joined(checkpoint, kernels, ["model.norm.weight"])
    head = embedding if config.tied_embeddings else _joined(checkpoint, kernels, ["lm_head.weight"])
    return DecoderWeights(embedding, layers, final_norm, kernels.pack_linear(head, None))


def _load_layer(checkpoint: Checkpoint, kernels: Kernels, prefix: str) -> LayerWeights:
    def linear(*names: str) -> PackedLinear:
        full = [prefix + name for name in names]
        weight = _joined(checkpoint, kernels, [f"{name}.weight" for name in full])
        has_bias = checkpoint.has(f"{full[0]}.bias")
        bias = _joined(checkpoint, kernels, [f"{name}.bias" for name in full]) if has_bias else None
        return kernels.pack_linear(weight, bias)

    def norm(name: str) -> Tensor | None:
        full = f"{prefix}{name}.weight"
        return _joined(checkpoint, kernels, [full]) if checkpoint.has(full) else None

    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=norm("self_attn.q_norm"),
        k_norm=norm("self_attn.k_norm"),
        out=linear("self_attn.o_proj"),
        post_attention_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def _joined(checkpoint: Checkpoint, kernels: Kernels, names: Sequence[str]) -> Tensor:
    """Upload tensors joined along their first axis; the copy is the one owner of its memory."""
    parts = [_halves_split(checkpoint.take(name), name, checkpoint.config) for name in names]
    owned = len(parts) == 1 and parts[0].flags.writeable and parts[0].flags.c_contiguous
    return kernels.upload(parts[0] if owned else np.concatenate(parts))


def _halves_split(tensor: Float32, name: str, config: DecoderConfig) -> Float32:
    """Reorder the rows of interleaved query and key heads so that one kind of RoPE does for all.

    A query's product with a key is the same whatever order their elements are in, as long as it is one.
    """
    if not config.interleaved_rope or not any(part in name for part in (".q_proj.", ".k_proj.")):
        return tensor
    heads = tensor.reshape(-1, config.head_dim, *tensor.shape[1:])
    return heads[:, half_split_order(config.head_dim)].reshape(tensor.shape)


class Decoder:
    """A loaded model: tokens of a batch in, logits out, KV into the pool on the way."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, kernels: Kernels, max_model_len: int) -> None:
        self._config = config
        self._weights = weights
        self._kernels = kernels
        self._inverse, self._rope_factor = inverse_frequencies(config.rope, config.head_dim, max_model_len)

    def forward(
        self, batch: RaggedBatch, pool: Sequence[LayerKV], on_layer: Callable[[int], None]
    ) -> npt.NDArray[np.float32]:
        """Compute ``batch``; return float32 logits [number of sampling rows, vocab_size].

        Calls ``on_layer(layer)`` when the layer's KV is in ``pool``.
        """
        kernels, weights, config = self._kernels, self._weights, self._config
        plan = kernels.plan_attention(batch, config.windows)
        tables = rotation_tables(self._inverse, self._rope_factor, batch.positions, config.num_rotated_heads)
        cosine, sine = map(kernels.upload, tables)
        residual = kernels.embed(kernels.upload(batch.token_ids), weights.embedding)
        hidden = kernels.rms_norm(residual, weights.layers[0].input_norm, config.rms_norm_eps)
        next_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.final_norm]
        for index, layer in enumerate(weights.layers):
            queries = self._project(layer, hidden, cosine, sine, pool[index], plan)
            on_layer(index)
            attended = kernels.attention(queries, pool[index], plan, config.windows[index])
            hidden, residual = kernels.add_rms_norm(
                kernels.linear(attended, layer.out), residual, layer.post_attention_norm, config.rms_norm_eps
            )
            mlp = kernels.linear(kernels.silu_mul(kernels.linear(hidden, layer.gate_up)), layer.down)
            hidden, residual = kernels.add_rms_norm(mlp, residual, next_norms[index], config.rms_norm_eps)
        return self._logits(hidden, batch)

    def _project(
        self, layer: LayerWeights, hidden: Tensor, cosine: Tensor, sine: Tensor, kv: LayerKV, plan: AttentionPlan
    ) -> Tensor:
        """Write keys and values of ``hidden`` [N, hidden] into ``kv``; return the queries [N, H, D]."""
        config, kernels = self._config, self._kernels
        rotated, heads = config.num_rotated_heads, config.num_heads
        qkv = kernels.linear(hidden, layer.qkv)
        split = rotated * config.head_dim
        query_keys = qkv[:, :split].reshape([-1, rotated, config.head_dim])
        values = qkv[:, split:].reshape([-1, config.num_kv_heads, config.head_dim])
        if config.qk_norm:
            queries = kernels.rms_norm(query_keys[:, :heads], layer.q_norm, config.rms_norm_eps)
            keys = kernels.rms_norm(query_keys[:, heads:], layer.k_norm, config.rms_norm_eps)
            query_keys = paddle.concat([queries, keys], 1)
        query_keys = kernels.rope(query_keys, cosine, sine)
        kernels.write_kv(query_keys[:, heads:], values, kv, plan)
        return query_keys[:, :heads]

    def _logits(self, hidden: Tensor, batch: RaggedBatch) -> npt.NDArray[np.float32]:
        if not batch.sampling_rows.size:
            return np.empty((0, self._config.vocab_size), np.float32)
        rows = self._kernels.take_rows(hidden, batch.sampling_rows)
        return self._kernels.download(self._kernels.linear(rows, self._weights.lm_head))
