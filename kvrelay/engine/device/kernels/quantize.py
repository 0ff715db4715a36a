"""Rows rounded to float8 (e4m3) with one scale for each: by themselves, of an RMS norm, of SiLU times the other half.

A program has one whole row in registers. The largest magnitude of a row becomes 448, the largest number of the type.
A row that is not finite gives NaN in every product with it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _store(value, values, scales, row, columns, inside, WIDTH: tl.constexpr):
    """Store float32 ``value`` as float8 and its scale; no scale is so small that its inverse is infinite."""
    largest = tl.maximum(tl.max(tl.abs(value), 0), 1e-30)
    tl.store(scales + row, tl.div_rn(largest, 448.0))
    rounded = (value * tl.div_rn(448.0, largest)).to(values.dtype.element_ty)
    tl.store(values + row * WIDTH + columns, rounded, mask=inside)


@triton.jit
def quantize_kernel(x, values, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row of ``x`` [N, WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    _store(value, values, scales, row, columns, inside, WIDTH)


@triton.jit
def add_norm_quantize_kernel(
    residual, due, weight, values, scales, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr
):
    """One row: ``due`` is added to ``residual``, whose RMS norm is quantized."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    place = residual + row * WIDTH + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(due + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    _store(value * scale * gain, values, scales, row, columns, inside, WIDTH)


@triton.jit
def silu_mul_quantize_kernel(x, values, scales, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """One row of ``x`` [N, 2 * FFN], gate first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < FFN
    gate = tl.load(x + row * 2 * FFN + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * FFN + FFN + columns, mask=inside, other=0.0).to(tl.float32)
    _store(gate / (1.0 + tl.exp(-gate)) * up, values, scales, row, columns, inside, FFN)


def quantize(x: Any, values: Any, scales: Any) -> None:
    """Write ``x`` [N, width] to ``values`` float8 [N, width] and ``scales`` float32 [N, 1]."""
    block, warps = _row_of(x.shape[1])
    quantize_kernel[(x.shape[0],)](x, values, scales, x.shape[1], block, num_warps=warps)


def add_norm_quantize(residual: Any, due: Any | None, weight: Any, eps: float, values: Any, scales: Any) -> None:
    """Add ``due`` to ``residual`` [N, width] in place, unless it is None; quantize the RMS norm of that."""
    rows, width = residual.shape
    block, warps = _row_of(width)
    add_norm_quantize_kernel[(rows,)](
        residual, residual if due is None else due, weight, values, scales, eps, width, block, due is not None,
        num_warps=warps,
    )  # fmt: skip


def silu_mul_quantize(gate_up: Any, values: Any, scales: Any) -> None:
    """Quantize silu(gate) * up for ``gate_up`` [N, 2 * ffn]."""
    rows, ffn = values.shape
    block, warps = _row_of(ffn)
    silu_mul_quantize_kernel[(rows,)](gate_up, values, scales, ffn, block, num_warps=warps)


def _row_of(width: int) -> tuple[int, int]:
    """Return the block that holds a row, and warps for it: 16 elements a thread, or more in the longest rows."""
    block = triton.next_power_of_2(width)
    return block, min(32, max(4, block // 512))
