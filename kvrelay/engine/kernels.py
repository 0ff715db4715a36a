"""The interface between the decoder and the kernels of a device. A new kind of kernels implements ``Kernels``.

Letters in shapes: N tokens of the step over all sequences, H query heads, G key/value heads, D elements of a head.
A ``Tensor`` is a type of the implementation, which the decoder does not inspect. It is valid until the operation that
returned it is called again, because an implementation may reuse one buffer per operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch
from kvrelay.engine.prompt_logprobs import PromptRows
from kvrelay.engine.rope import Rotation
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome
from kvrelay.protocol.request import PromptLogprobs

Tensor: TypeAlias = Any
"""A tensor of the implementation."""

PackedLinear: TypeAlias = Any
"""A weight matrix and bias in the layout of the implementation."""

StepContext: TypeAlias = Any
"""Data about one step that is computed once for all layers."""


class LayerKV(NamedTuple):
    """Keys and values of one layer of the pool, by slot: each ``[num_blocks * block_size, G, D]``."""

    keys: Tensor
    values: Tensor


class KVPool(Protocol):
    """Keys and values of all layers, kept consistent with the node's KVMemory for other readers and writers."""

    layers: list[LayerKV]

    def before_step(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """Make the context of ``scheduled``, which other processes may have written, visible to the kernels."""

    def after_layer(self, layer: int, batch: RaggedBatch) -> None:
        """Make the KV that the kernels wrote for ``batch`` in ``layer`` visible in the memory."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of the heads, and their RoPE rotation."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotation: Rotation


class HeadNorms(NamedTuple):
    """Weights [D] of the norms of query and key heads, where a model has them."""

    queries: Tensor
    keys: Tensor


class WeightPacking(Protocol):
    """Moves weights to the device. Used once, when a model is loaded."""

    def upload(self, array: npt.NDArray[np.float32]) -> Tensor:
        """Return ``array`` on the device. The result may share its memory."""

    def pack_table(self, table: Tensor) -> Tensor:
        """Prepare ``table`` [vocab, hidden] for ``embed``."""

    def pack_norm(self, weight: Tensor) -> Tensor:
        """Prepare the ``weight`` of a norm for ``normalize``, ``logits`` and HeadNorms."""

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> PackedLinear:
        """Prepare ``weight`` [out, in] and ``bias`` [out] for GEMMs.

        ``fp32_output``: the result is not the input of another GEMM, so it should not be rounded to ``dtype``.
        ``never_quantize``: do not quantize this weight.
        """


class Kernels(WeightPacking, Protocol):
    """The operations of a decoder.

    ``dtype``: the type of weights and of the inputs of GEMMs. ``kv_dtype``: the type of the pool. The residual stream
    between layers has at least the precision of ``dtype``.
    """

    dtype: str
    kv_dtype: str

    def map_pool(self, memory: KVMemory) -> KVPool:
        """Return the pool in ``memory`` as these kernels read and write it. Called once for a memory."""

    def begin_step(self, batch: RaggedBatch, windows: Sequence[int | None]) -> StepContext:
        """Prepare the computation of ``batch`` in layers with any of ``windows``. The previous step must be done."""

    def embed(self, step: StepContext, table: Tensor) -> Tensor:
        """Return the rows of ``table`` for the step's tokens, the first residual: [N, hidden]."""

    def normalize(self, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``residual / sqrt(mean(residual ** 2) + eps) * weight`` over the last axis: [N, hidden]."""

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """Return ``x @ weight.T + bias`` for x [N, in]: [N, out]."""

    def add_linear(self, x: Tensor, packed: PackedLinear, residual: Tensor) -> Tensor:
        """Return ``residual + linear(x, packed)``, which may be ``residual`` itself, changed."""

    def apply_rope_and_write_kv(
        self, qkv: Tensor, norms: HeadNorms | None, eps: float, layer: LayerKV, step: StepContext
    ) -> Tensor:
        """Normalize and rotate the heads of ``qkv`` [N, (H + 2 * G) * D]; return the queries [N, H, D].

        Keys and values are written to ``layer``.
        """

    def attention(self, queries: Tensor, layer: LayerKV, step: StepContext, window: int | None) -> Tensor:
        """Return attention of ``queries`` [N, H, D] over the KV of their sequences in ``layer``: [N, H * D].

        A query attends to positions up to its own; with a window to the last ``window`` of them. The result for one
        sequence does not depend on the others in the batch, nor on how its tokens were cut into steps, but for
        rounding.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up for ``gate_up`` [N, 2 * ffn], gate first: [N, ffn]."""

    def logits(
        self, residual: Tensor, rows: npt.NDArray[np.int64], weight: Tensor, eps: float, head: PackedLinear
    ) -> Tensor:
        """Return linear(normalize(residual[rows], weight, eps), head): [len(rows), vocab].

        For ``sample`` or ``prompt_logprobs``.
        """

    def sample(self, logits: Tensor | None, batch: Sequence[ScheduledSequence]) -> list[SequenceOutcome]:
        """Return the output tokens of each of ``batch``, or its error, as ``kvrelay.engine.sampler`` does on the host.

        ``logits`` has, in order of the batch, a row for each one that samples and one more for each of its drafts; None
        if no sequence samples.
        """

    def prompt_logprobs(self, logits: Tensor, rows: PromptRows) -> PromptLogprobs:
        """Return the log probabilities of ``rows``, whose logits these are, as ``prompt_logprobs.logprobs_of`` does.

        Raises EngineError if logits are not finite.
        """

    def finite_rows(self, residual: Tensor) -> npt.NDArray[np.bool_]:
        """Return for each row of ``residual`` whether all of it is finite, on the host: [N]."""
