"""What the decoder asks of its device, all of it: one interface, so that faster kernels are a class and a setting.

Letters in shapes: N tokens of the step over all sequences, H query heads, G key/value heads, D elements of a head.
A ``Tensor`` is whatever the implementation computes on; the decoder only passes it on. It is good until the operation
that made it is called again: an implementation may give each operation one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch
from kvrelay.engine.rope import Rotation
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import KVRelayError
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.messages.engine import SequenceOutcome

Tensor: TypeAlias = Any
"""A tensor of the implementation."""

PackedLinear: TypeAlias = Any
"""A weight matrix and bias in the form the implementation likes best."""

StepContext: TypeAlias = Any
"""What the operations need to know about one step, computed once for all layers."""


class KernelsUnavailableError(KVRelayError):
    """What these kernels need is not on this machine."""

    code = "kernels_unavailable"


class LayerKV(NamedTuple):
    """Keys and values of one layer of the pool, by slot: each ``[num_blocks * block_size, G, D]``."""

    keys: Tensor
    values: Tensor


class KVPool(Protocol):
    """Keys and values of all layers, kept equal to the node's KVMemory wherever somebody else reads or writes it."""

    layers: list[LayerKV]

    def before_step(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """Make the context that ``scheduled`` builds upon, which others may have written, visible to the kernels."""

    def after_layer(self, layer: int, batch: RaggedBatch) -> None:
        """Make the KV that the kernels wrote for ``batch`` in ``layer`` visible in the memory."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of the heads, and how they turn with their position."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotation: Rotation


class HeadNorms(NamedTuple):
    """Weights [D] of the norms of query and key heads, where a model has them."""

    queries: Tensor
    keys: Tensor


class WeightPacking(Protocol):
    """How weights get to where they are computed with, once, when a model is loaded."""

    def upload(self, array: npt.NDArray[np.float32]) -> Tensor:
        """Return ``array`` on the device. May share its memory."""

    def pack_table(self, table: Tensor) -> Tensor:
        """Prepare ``table`` [vocab, hidden] for ``embed``, once, when the model is loaded."""

    def pack_norm(self, weight: Tensor) -> Tensor:
        """Prepare the ``weight`` of a norm for ``normalize`` and the like, once, when the model is loaded."""

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, fp32_output: bool = False, never_quantize: bool = False
    ) -> PackedLinear:
        """Prepare ``weight`` [out, in] and ``bias`` [out] for products, once, when the model is loaded.

        ``fp32_output``: the result is not multiplied as it is, so it should not be rounded to ``dtype``.
        ``never_quantize``: the weight is never to be quantized.
        """


class Kernels(WeightPacking, Protocol):
    """The operations of a decoder.

    ``dtype``: the type of weights and of what is multiplied with them. ``kv_dtype``: that of the pool. The residual
    stream between layers is never less exact than ``dtype``.
    """

    dtype: str
    kv_dtype: str

    def map_pool(self, memory: KVMemory) -> KVPool:
        """Return the pool in ``memory`` as these kernels read and write it. Called once for a memory."""

    def begin_step(self, batch: RaggedBatch, windows: Sequence[int | None]) -> StepContext:
        """Prepare the computation of ``batch`` in layers with any of ``windows``. The step before is over then."""

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
        """Normalize and turn the heads of ``qkv`` [N, (H + 2 * G) * D]; return the queries [N, H, D].

        Keys and values are in ``layer`` on return.
        """

    def attention(self, queries: Tensor, layer: LayerKV, step: StepContext, window: int | None) -> Tensor:
        """Return attention of ``queries`` [N, H, D] over what ``layer`` holds of their sequences: [N, H * D].

        A query attends to positions up to its own; with a window to the last ``window`` of them. The result for one
        sequence does not depend on the others in the batch, nor on how its tokens were cut into steps, but for
        rounding.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up for ``gate_up`` [N, 2 * ffn], gate first: [N, ffn]."""

    def logits(
        self, residual: Tensor, rows: npt.NDArray[np.int64], weight: Tensor, eps: float, head: PackedLinear
    ) -> Tensor:
        """Return linear(normalize(residual[rows], weight, eps), head): [len(rows), vocab], for ``sample``."""

    def sample(self, logits: Tensor | None, batch: Sequence[ScheduledSequence]) -> list[SequenceOutcome]:
        """Return the output tokens of each of ``batch``, or its error, as ``kvrelay.engine.sampler`` does on the host.

        ``logits`` has, in order of the batch, a row for each one that samples and one more for each of its drafts; None
        if nobody samples.
        """

    def finite_rows(self, residual: Tensor) -> npt.NDArray[np.bool_]:
        """Return for each row of ``residual`` whether all of it is finite, on the host: [N]."""
