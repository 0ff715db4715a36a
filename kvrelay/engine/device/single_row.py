"""Linear layers that treat a step of one row apart: its products take as long as the weights take to read."""

from __future__ import annotations

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.kernels import single_row
from kvrelay.engine.device.operations import Operations
from kvrelay.engine.device.projections import FrameworkProjections
from kvrelay.engine.device.weights import Linear


class SingleRowProjections(FrameworkProjections):
    """The framework's projections, but for a single row by kernels that also do what comes before and after.

    For weights of 16 bits: in float32 a row would differ from the same row in a larger step by more than a rounding.
    """

    def __init__(self, framework: Framework, operations: Operations, eps: float, dtype: str) -> None:
        super().__init__(framework, operations, eps)
        self._dtype = dtype

    def normed(self, residual: Tensor, due: Tensor | None, norm: Tensor, linear: Linear) -> Tensor:
        if not _is_single(residual, linear):
            return super().normed(residual, due, norm, linear)
        out = self._row(linear.weight.shape[0])
        single_row.multiply(residual, norm, self._eps, linear.weight, linear.bias, out)
        return out

    def gated(self, residual: Tensor, due: Tensor | None, norm: Tensor, gate_up: Linear) -> Tensor:
        if not _is_single(residual, gate_up):
            return super().gated(residual, due, norm, gate_up)
        out = self._row(gate_up.weight.shape[0] // 2)
        single_row.multiply(residual, norm, self._eps, gate_up.weight, gate_up.bias, out, gated=True)
        return out

    def add(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor | None:
        if not _is_single(x, linear):
            return super().add(residual, x, linear)
        single_row.multiply(x, None, self._eps, linear.weight, linear.bias, residual, adds=True)
        return None

    def _row(self, width: int) -> Tensor:
        return self._framework.empty((1, width), self._dtype)


def _is_single(x: Tensor, linear: Linear) -> bool:
    rows, depth = x.shape
    return rows == 1 and single_row.has_kernel(linear.weight.shape[0] // 2, depth)
