"""SiLU of the gate times the other half."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def silu_mul_kernel(x, out, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of one row of ``x`` [N, 2 * FFN], gate first."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FFN
    gate = tl.load(x + row * 2 * FFN + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * FFN + FFN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * FFN + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Any, out: Any) -> None:
    """Write silu(gate) * up for ``gate_up`` [N, 2 * ffn] to ``out`` [N, ffn]."""
    rows, ffn = out.shape
    block = min(1024, triton.next_power_of_2(ffn))
    silu_mul_kernel[(rows, triton.cdiv(ffn, block))](gate_up, out, ffn, block, num_warps=4)
