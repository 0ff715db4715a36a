"""The GEMMs of a decode step by themselves: the framework's, with and without adding to the residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from steps import Shape, operations

from gpu_check.context import Context
from kvrelay.engine.device.framework import Tensor
from kvrelay.engine.device.single_row import SingleRowProjections
from kvrelay.engine.device.weights import Linear

SHAPES = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
"""Rows and columns of the weights of Llama-3-8B."""


def run(context: Context) -> None:
    """Measure each shape for several numbers of rows, on weights that the cache does not hold."""
    shapes = {"tiny": (64, 32)} if context.tiny else SHAPES
    for name, (rows, columns) in shapes.items():
        copies = 2 if context.tiny else max(2, int(6e8 // (2 * rows * columns)))
        weights = [context.random(rows, columns, scale=0.02) for _ in range(copies)]
        for count in (1, 4) if context.tiny else (1, 8, 16, 32, 64, 128, 256):
            x = context.random(count, columns)
            residual = context.random(count, rows)
            limit = weights[0].nbytes / context.copy_bytes_per_s * 1e6
            limit = max(limit, 2 * count * rows * columns / context.gemm_flops_per_s * 1e6)
            _row(context, f"{name}, {count} rows, GEMM", [partial(_linear, context, x, w) for w in weights], limit)
            works = [partial(context.framework.add_linear, residual, x, w, None) for w in weights]
            if name in ("out", "down", "tiny"):
                _row(context, f"{name}, {count} rows, added to the residual", works, limit)
            if count == 1 and name != "lm_head" and context.device == "gpu":
                compute = single_row(context, name)
                alone = [partial(compute, Linear(weight, None)) for weight in weights]
                _row(context, f"{name}, one row, with all that belongs to it, own kernel", alone, limit)


def single_row(context: Context, name: str) -> Callable[[Linear], object]:
    """Return what computes a product of a single row and what comes before and after it."""
    rows, columns = SHAPES[name]
    project = SingleRowProjections(
        context.framework, operations(Shape(dtype="bfloat16"), context.framework)[0], 1e-5, "bfloat16"
    )
    residual, norm = context.random(1, columns if name in ("qkv", "gate_up") else rows), context.random(columns)
    x = context.random(1, columns)

    def compute(linear: Linear) -> object:
        if name == "qkv":
            return project.normed(residual, None, norm, linear)
        if name == "gate_up":
            return project.gated(residual, None, norm, linear)
        return project.add(residual, x, linear)

    return compute


def _linear(context: Context, x: Tensor, weight: Tensor) -> Tensor:
    return context.framework.linear(x, weight, None, "float32" if weight.shape[0] > 100000 else None)


def _row(context: Context, name: str, works: Sequence[Callable[[], object]], limit: float) -> None:
    with torch.inference_mode():
        seconds = context.seconds_in_graph(works, repeats=5)
    context.report.add("gemm", name, seconds * 1e6, "us", limit)
