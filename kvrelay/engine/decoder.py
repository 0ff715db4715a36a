"""The decoder: packed weights and one forward pass that covers every architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from kvrelay.engine.batch import Bools, RaggedBatch
from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder_config import DecoderConfig
from kvrelay.engine.kernels import HeadNorms, Kernels, KVPool, LayerKV, PackedLinear, Tensor, WeightPacking
from kvrelay.engine.prompt_logprobs import PromptRows, add_prompt_logprobs
from kvrelay.engine.rope import half_split_order
from kvrelay.engine.safetensors_file import StoredTensor
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, with projections that read the same input joined into one matrix."""

    input_norm: Tensor
    qkv: PackedLinear
    head_norms: HeadNorms | None
    out: PackedLinear
    post_attention_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder. With tied embeddings ``lm_head`` is packed from ``embedding``."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    lm_head: PackedLinear


def load_weights(checkpoint: Checkpoint, kernels: WeightPacking) -> DecoderWeights:
    """Read every tensor of ``checkpoint`` and pack it for ``kernels``, one matrix at a time."""
    config = checkpoint.config
    embedding = _joined(checkpoint, kernels, ["model.embed_tokens.weight"])
    layers = [_load_layer(checkpoint, kernels, f"model.layers.{layer}.") for layer in range(config.num_layers)]
    final_norm = kernels.pack_norm(_joined(checkpoint, kernels, ["model.norm.weight"]))
    head = embedding if config.tied_embeddings else _joined(checkpoint, kernels, ["lm_head.weight"])
    lm_head = kernels.pack_linear(head, None, fp32_output=True, never_quantize=True)
    return DecoderWeights(kernels.pack_table(embedding), layers, final_norm, lm_head)


def _load_layer(checkpoint: Checkpoint, kernels: WeightPacking, prefix: str) -> LayerWeights:
    def linear(*names: str, fp32_output: bool = True) -> PackedLinear:
        full = [prefix + name for name in names]
        weight = _joined(checkpoint, kernels, [f"{name}.weight" for name in full])
        has_bias = checkpoint.has(f"{full[0]}.bias")
        bias = _joined(checkpoint, kernels, [f"{name}.bias" for name in full]) if has_bias else None
        return kernels.pack_linear(weight, bias, fp32_output=fp32_output)

    def norm(name: str) -> Tensor | None:
        full = f"{prefix}{name}.weight"
        return kernels.pack_norm(_joined(checkpoint, kernels, [full])) if checkpoint.has(full) else None

    queries, keys = norm("self_attn.q_norm"), norm("self_attn.k_norm")
    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=None if queries is None else HeadNorms(queries, keys),
        out=linear("self_attn.o_proj"),
        post_attention_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj", fp32_output=False),
        down=linear("mlp.down_proj"),
    )


@runtime_checkable
class UploadsStored(Protocol):
    """A WeightPacking that takes tensors as they are in their file."""

    def upload_stored(self, parts: Sequence[StoredTensor]) -> Tensor:
        """Return ``parts`` joined along their first axis."""


def _joined(checkpoint: Checkpoint, kernels: WeightPacking, names: Sequence[str]) -> Tensor:
    """Upload tensors joined along their first axis; the copy is the one owner of its memory."""
    stored = [_halves_split(checkpoint.take_stored(name), name, checkpoint.config) for name in names]
    if isinstance(kernels, UploadsStored):
        return kernels.upload_stored(stored)
    parts = [one.float32() for one in stored]
    owned = len(parts) == 1 and parts[0].flags.writeable and parts[0].flags.c_contiguous
    return kernels.upload(parts[0] if owned else np.concatenate(parts))


def _halves_split(tensor: StoredTensor, name: str, config: DecoderConfig) -> StoredTensor:
    """Reorder the rows of interleaved query and key heads, so that one kind of RoPE serves all models.

    The dot product of a query and a key does not change if the elements of both are reordered alike.
    """
    if not config.interleaved_rope or not any(part in name for part in (".q_proj.", ".k_proj.")):
        return tensor
    heads = tensor.raw.reshape(-1, config.head_dim, *tensor.shape[1:])
    return replace(tensor, raw=heads[:, half_split_order(config.head_dim)].reshape(tensor.shape))


class Forward(NamedTuple):
    """Result of a forward pass: ``outcomes``, one for each of the batch's items, and ``broken_rows`` [rows].

    ``broken_rows``: rows whose last hidden state is not finite. None if every row has logits, because those logits are
    then not finite either.
    """

    outcomes: list[SequenceOutcome]
    broken_rows: Bools | None


class Decoder:
    """A loaded model: takes the tokens of a batch, writes their KV to the pool and returns sampled tokens."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, kernels: Kernels) -> None:
        self._config = config
        self._weights = weights
        self._kernels = kernels

    def map_pool(self, memory: KVMemory) -> KVPool:
        """Return the pool in ``memory`` as ``forward`` takes it."""
        return self._kernels.map_pool(memory)

    def forward(
        self,
        batch: RaggedBatch,
        pool: Sequence[LayerKV],
        on_layer: Callable[[int], None],
        wanted: Sequence[PromptRows] = (),
    ) -> Forward:
        """Compute ``batch``, which must not be empty, and the log probabilities of the ``wanted`` rows.

        Calls ``on_layer(layer)`` when the layer's KV is in ``pool``.
        """
        kernels, weights, config = self._kernels, self._weights, self._config
        eps = config.rms_norm_eps
        step = kernels.begin_step(batch, config.windows)
        residual = kernels.embed(step, weights.embedding)
        for index, layer in enumerate(weights.layers):
            qkv = kernels.linear(kernels.normalize(residual, layer.input_norm, eps), layer.qkv)
            queries = kernels.apply_rope_and_write_kv(qkv, layer.head_norms, eps, pool[index], step)
            on_layer(index)
            attended = kernels.attention(queries, pool[index], step, config.windows[index])
            residual = kernels.add_linear(attended, layer.out, residual)
            gate_up = kernels.linear(kernels.normalize(residual, layer.post_attention_norm, eps), layer.gate_up)
            residual = kernels.add_linear(kernels.silu_mul(gate_up), layer.down, residual)
        broken = None if batch.samples_after_every_row else ~kernels.finite_rows(residual)
        outcomes = self._sample(residual, batch)
        if wanted:
            self._add_prompt_logprobs(outcomes, residual, wanted)
        return Forward(outcomes, broken)

    def _sample(self, residual: Tensor, batch: RaggedBatch) -> list[SequenceOutcome]:
        kernels, weights = self._kernels, self._weights
        if not batch.sampling_rows.size:
            return kernels.sample(None, batch.items)
        eps = self._config.rms_norm_eps
        logits = kernels.logits(residual, batch.sampling_rows, weights.final_norm, eps, weights.lm_head)
        return kernels.sample(logits, batch.items)

    def _add_prompt_logprobs(
        self, outcomes: list[SequenceOutcome], residual: Tensor, wanted: Sequence[PromptRows]
    ) -> None:
        kernels, weights, eps = self._kernels, self._weights, self._config.rms_norm_eps

        def compute(piece: PromptRows) -> PromptLogprobs:
            logits = kernels.logits(residual, piece.rows, weights.final_norm, eps, weights.lm_head)
            return kernels.prompt_logprobs(logits, piece)

        add_prompt_logprobs(outcomes, wanted, self._config.vocab_size, compute)
