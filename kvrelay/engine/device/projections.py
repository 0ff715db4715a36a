"""The linear layers of a model, each with what comes directly before it.

An implementation chooses what it computes in one kernel. The residual has the model's type in all of them.
"""

from __future__ import annotations

from typing import Protocol

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.operations import Operations, Quantized, QuantizingOperations
from kvrelay.engine.device.weights import Linear


class Projections(Protocol):
    """Linear layers around the ``residual`` [N, hidden].

    What ``add`` and ``feed_forward`` return is still to be added to the residual, which is done with what is handed to
    the next one as ``due``; None: nothing is.
    """

    def normed(self, residual: Tensor, due: Tensor | None, norm: Tensor, linear: Linear) -> Tensor:
        """Return ``linear`` of the RMS norm of ``residual``: [N, out]."""

    def add(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor | None:
        """Add ``linear`` of ``x`` [N, in] to ``residual``."""

    def feed_forward(
        self, residual: Tensor, due: Tensor | None, norm: Tensor, gate_up: Linear, down: Linear
    ) -> Tensor | None:
        """Add ``down`` of silu(gate) * up to ``residual``; ``gate_up`` of its RMS norm gives gate and up."""

    def logits(self, residual: Tensor, rows: Tensor, norm: Tensor, head: Linear) -> Tensor:
        """Return ``head`` of the RMS norm of the chosen ``rows`` of ``residual``: float32 [S, vocab]."""


class FrameworkProjections:
    """Projections by the framework's GEMMs, which add to the residual themselves."""

    def __init__(self, framework: Framework, operations: Operations, eps: float) -> None:
        self._framework = framework
        self._operations = operations
        self._eps = eps

    def normed(self, residual: Tensor, due: Tensor | None, norm: Tensor, linear: Linear) -> Tensor:
        normed = self._operations.rms_norm(residual, norm, self._eps)
        return self._framework.linear(normed, linear.weight, linear.bias)

    def add(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor | None:
        self._framework.add_linear(residual, x, linear.weight, linear.bias)
        return None

    def feed_forward(
        self, residual: Tensor, due: Tensor | None, norm: Tensor, gate_up: Linear, down: Linear
    ) -> Tensor | None:
        return self.add(residual, self.gated(residual, due, norm, gate_up), down)

    def gated(self, residual: Tensor, due: Tensor | None, norm: Tensor, gate_up: Linear) -> Tensor:
        """Return silu(gate) * up for gate and up that ``gate_up`` gives of the RMS norm: [N, ffn]."""
        return self._operations.silu_mul(self.normed(residual, due, norm, gate_up))

    def logits(self, residual: Tensor, rows: Tensor, norm: Tensor, head: Linear) -> Tensor:
        chosen = self._operations.rms_norm(residual, norm, self._eps, rows)
        return self._framework.linear(chosen, head.weight, head.bias, "float32")


class Float8Projections(FrameworkProjections):
    """Projections of rows and weights in float8 by the framework's scaled GEMM; logits are those of the base class.

    The GEMM does not add to the residual: the next norm does. Rows are quantized by what computes them, except what
    attention gives.
    """

    def __init__(self, framework: Framework, operations: QuantizingOperations, eps: float, dtype: str) -> None:
        super().__init__(framework, operations, eps)
        self._quantizing = operations
        self._dtype = dtype

    def normed(self, residual: Tensor, due: Tensor | None, norm: Tensor, linear: Linear) -> Tensor:
        return self._product(self._quantizing.quantized_norm(residual, due, norm, self._eps), linear)

    def add(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor | None:
        return self._product(self._quantizing.quantized(x), linear)

    def feed_forward(
        self, residual: Tensor, due: Tensor | None, norm: Tensor, gate_up: Linear, down: Linear
    ) -> Tensor | None:
        return self._product(self._quantizing.quantized_silu_mul(self.normed(residual, due, norm, gate_up)), down)

    def _product(self, rows: Quantized, linear: Linear) -> Tensor:
        out = self._framework.scaled_linear(rows.values, rows.scales, linear.weight, linear.scales, self._dtype)
        return out if linear.bias is None else out.add_(linear.bias)
