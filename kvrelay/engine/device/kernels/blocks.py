"""Entries of block tables."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def set_entries_kernel(table, entries, count, BLOCK: tl.constexpr):
    """``table[entries[0, i]] = entries[1, i]``."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    place = tl.load(entries + index, mask=inside, other=0).to(tl.int64)
    tl.store(table + place, tl.load(entries + count + index, mask=inside, other=0), mask=inside)


def set_entries(table: Any, entries: Any) -> None:
    """Set flat places ``entries[0]`` of ``table`` to ``entries[1]``, int32 [2, count]."""
    count = entries.shape[1]
    set_entries_kernel[(triton.cdiv(count, 256),)](table, entries, count, 256, num_warps=2)
