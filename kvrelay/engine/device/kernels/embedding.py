"""The rows of the embedding table for a step's tokens, which the host knows or an earlier step has just sampled."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["tokens", "table_rows"])
def embed_kernel(tokens, table_rows, last_tokens, table, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of one row. A token below 0 stands for the last one sampled for the row's sequence."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    token = tl.load(tokens + row)
    sampled = tl.load(last_tokens + tl.maximum(tl.load(table_rows + row), 0))
    token = tl.maximum(tl.where(token < 0, sampled, token), 0).to(tl.int64)
    value = tl.load(table + token * WIDTH + columns, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + columns, value, mask=inside)


def embed(tokens: Any, table_rows: Any, last_tokens: Any, table: Any, out: Any) -> None:
    """Write ``table[tokens]`` to ``out`` [N, width]; see the kernel for tokens below 0."""
    rows, width = out.shape
    block = min(2048, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    embed_kernel[grid](tokens, table_rows, last_tokens, table, out, width, block, num_warps=4)
