"""Linear layers of a single row, with the RMS norm before them and SiLU or the addition to the residual after them.

Such a product takes as long as its weight takes to read, and the matrix units do not help. A program multiplies a few
rows of the weight with all of ``x`` and adds up in float32; many programs at once keep the memory busy. What else is
done with so few numbers is free here, while a kernel of its own would cost a launch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

COLUMNS = 4
"""Rows of the weight, which are columns of the output, of one program."""

NARROWEST = 128
"""Elements of the inner dimension that a program reads at a time, at least."""


@triton.jit
def single_row_kernel(
    x, gain, weight, bias, out, eps, N: tl.constexpr, K: tl.constexpr, NORMS: tl.constexpr, GATED: tl.constexpr,
    ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``BN`` elements of ``out`` [N]. GATED: the weight is [2 * N, K], the gate's rows first."""
    columns = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    inner = tl.arange(0, BK)
    gate = tl.zeros([BN, BK], tl.float32)
    up = tl.zeros([BN, BK], tl.float32)
    square = tl.zeros([BK], tl.float32)
    weight_at = weight + columns[:, None] * K + inner[None, :]
    for start in tl.static_range(0, K, BK):
        first = tl.load(weight_at + start, cache_modifier=".cg")
        if GATED:
            second = tl.load(weight_at + N * K + start, cache_modifier=".cg")
        value = tl.load(x + start + inner).to(tl.float32)
        if NORMS:
            square += value * value
            value = value * tl.load(gain + start + inner).to(tl.float32)
        gate += first.to(tl.float32) * value[None, :]
        if GATED:
            up += second.to(tl.float32) * value[None, :]
    result = tl.sum(gate, 1)
    if NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(square, 0) / K + eps)
        result = result * scale
    if HAS_BIAS:
        result += tl.load(bias + columns).to(tl.float32)
    if GATED:
        other = tl.sum(up, 1)
        if NORMS:
            other = other * scale
        if HAS_BIAS:
            other += tl.load(bias + N + columns).to(tl.float32)
        result = result / (1.0 + tl.exp(-result)) * other
    if ADDS:
        result += tl.load(out + columns).to(tl.float32)
    tl.store(out + columns, result.to(out.dtype.element_ty))


def has_kernel(columns: int, depth: int) -> bool:
    """Return whether ``multiply`` takes a weight of so many outputs and inputs."""
    return columns % COLUMNS == 0 and depth % NARROWEST == 0


def multiply(
    x: Any, gain: Any | None, eps: float, weight: Any, bias: Any | None, out: Any, *, gated: bool = False,
    adds: bool = False,
) -> None:  # fmt: skip
    """Write ``norm(x) @ weight.T + bias`` to ``out`` [1, N], or add it (``adds``), for x [1, K] and weight [N, K].

    ``gain``: the weight of the RMS norm; None: there is no norm. ``gated``: the weight is [2 * N, K], the bias [2 * N],
    and silu(gate) * up is written. The sizes have a kernel.
    """
    columns, depth = out.shape[1], x.shape[1]
    step = min(depth & -depth, 1024 if gated else 512)
    single_row_kernel[(columns // COLUMNS,)](
        x, x if gain is None else gain, weight, x if bias is None else bias, out, eps, columns, depth, gain is not None,
        gated, adds, bias is not None, COLUMNS, step, num_warps=4 if gated else 2,
    )  # fmt: skip
