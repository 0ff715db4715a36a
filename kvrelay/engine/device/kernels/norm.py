"""RMS norm of rows, all of them or chosen ones; rows that are not finite."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, out, rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr):
    """One row: ``out[i] = x[rows[i]] / sqrt(mean(x ** 2) + eps) * weight``, computed in float32."""
    target = tl.program_id(0).to(tl.int64)
    source = target
    if CHOSEN:
        source = tl.load(rows + target).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(x + source * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(out + target * WIDTH + columns, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Any, weight: Any, out: Any, eps: float, rows: Any | None) -> None:
    """Write the norm of ``x`` [N, width], or of its ``rows`` int32 [M], to ``out``."""
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    warps = 8 if block >= 2048 else 4
    chosen = rows is not None
    rms_norm_kernel[(out.shape[0],)](x, weight, out, rows if chosen else x, eps, width, block, chosen, num_warps=warps)


@triton.jit
def broken_rows_kernel(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row: whether anything in it is not finite."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row, tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 0))


def broken_rows(x: Any, out: Any) -> None:
    """Write to ``out`` int32 [N] 1 where a row of ``x`` [N, width] has anything that is not finite, else 0."""
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    broken_rows_kernel[(x.shape[0],)](x, out, width, block, num_warps=8 if block >= 2048 else 4)
