"""What the decoder asks of its device, all of it: one interface, so that faster kernels are a class and a setting.

Letters in shapes: N tokens of the step over all sequences, H query heads, G key/value heads, D elements of a head.
A ``Tensor`` is whatever the implementation computes on; the decoder only passes it on, slices rows and reshapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.engine.batch import RaggedBatch

Tensor: TypeAlias = Any
"""A tensor of the implementation."""

PackedLinear: TypeAlias = Any
"""A weight matrix and bias in the form the implementation likes best."""

AttentionPlan: TypeAlias = Any
"""What attention needs to know about one step, computed once for all layers."""


class LayerKV(NamedTuple):
    """Keys and values of one layer of the pool, by slot: each ``[num_blocks * block_size, G, D]``."""

    keys: Tensor
    values: Tensor


class Kernels(Protocol):
    """The operations of a decoder. All run in ``dtype`` and return new tensors unless they say otherwise."""

    dtype: str

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """Return ``array`` on the device: float32 becomes ``dtype``, integers stay. May share its memory."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare ``weight`` [out, in] and ``bias`` [out] for ``linear``, once, when the model is loaded."""

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Return rows of ``table`` [vocab, hidden] for ``token_ids`` [N]: [N, hidden]."""

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """Return ``x @ weight.T + bias`` for x [N, in]: [N, out]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x / sqrt(mean(x * x) + eps) * weight`` over the last axis, any leading shape."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (rms_norm(x + residual), x + residual) for x and residual [N, hidden]."""

    def rope(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn ``heads`` [N, H + G, D] by the tables of ``rope.rotation_tables``, of the same shape."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up for ``gate_up`` [N, 2 * ffn], gate first: [N, ffn]."""

    def plan_attention(self, batch: RaggedBatch, windows: Sequence[int | None]) -> AttentionPlan:
        """Prepare attention over ``batch`` for layers with any of ``windows``."""

    def write_kv(self, keys: Tensor, values: Tensor, layer: LayerKV, plan: AttentionPlan) -> None:
        """Write the step's new ``keys`` and ``values`` [N, G, D] into ``layer``; they are there on return."""

    def attention(self, queries: Tensor, layer: LayerKV, plan: AttentionPlan, window: int | None) -> Tensor:
        """Return attention of ``queries`` [N, H, D] over what ``layer`` holds of their sequences: [N, H * D].

        A query attends to positions up to its own; with a window to the last ``window`` of them. The result for one
        sequence does not depend on the others in the batch, nor on how its tokens were cut into steps, but for
        rounding.
        """

    def take_rows(self, x: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the given rows of ``x`` [N, hidden]."""

    def download(self, x: Tensor) -> npt.NDArray[np.float32]:
        """Return ``x`` as a float32 array on the host."""
