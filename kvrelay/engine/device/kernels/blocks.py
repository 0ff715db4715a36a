"""Copies of KV blocks between the device and host memory that the device maps, and entries of block tables."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_plane"])
def copy_blocks_kernel(
    source, target, blocks, source_plane, target_plane, first_plane, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one plane; a block below 0 is none."""
    block = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    plane = first_plane.to(tl.int64) + tl.program_id(1)
    if block >= 0:
        for first in range(0, WORDS, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < WORDS
            words = tl.load(source + plane * source_plane + block * WORDS + columns, mask=inside, other=0)
            tl.store(target + plane * target_plane + block * WORDS + columns, words, mask=inside)


def copy_blocks(source: Any, target: Any, blocks: Any, planes: range) -> None:
    """Copy ``blocks`` int32 [count] in ``planes`` from ``source`` to ``target``, both int32 [planes, blocks, words].

    Either may be host memory that the device reaches. A block may be any fixed piece of a plane, a token's slot too.
    """
    words = source.shape[2]
    block = min(1024, triton.next_power_of_2(words))
    copy_blocks_kernel[(blocks.shape[0], len(planes))](
        source, target, blocks, source.stride(0), target.stride(0), planes.start, words, block, num_warps=4
    )


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
