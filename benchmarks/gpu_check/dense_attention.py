"""A candidate: prefill attention that first gathers a sequence's blocks, then reads tiles by the bulk copy engine.

Gathering costs one pass over the context's keys and values; afterwards a tile is one descriptor load instead of many
pointers. It is measured next to the paged kernel and is not part of the engine.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634


@triton.jit
def gather_kernel(source, table, target, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """One block: ``target[i] = source[table[i]]``."""
    index = tl.program_id(0)
    block = tl.load(table + index).to(tl.int64)
    for first in range(0, WORDS, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < WORDS
        value = tl.load(source + block * WORDS + columns, mask=inside)
        tl.store(target + index.to(tl.int64) * WORDS + columns, value, mask=inside)


@triton.jit
def _attend(acc, total, highest, query, k, v, start, offset, position, scale, MASKED: tl.constexpr, BN: tl.constexpr):
    key = k.load([start, offset])
    scores = tl.dot(query, key.T)
    if MASKED:
        context = start + tl.arange(0, BN)
        scores = tl.where(context[None, :] <= position[:, None], scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    value = v.load([start, offset])
    acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, total, new_highest


@triton.jit
def dense_attention_kernel(
    q, k, v, out, length, scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One head of one tile of one sequence without earlier context, the last tiles first."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first = tile * BM
    position = first + tl.arange(0, BM)
    dims = tl.arange(0, D)
    place = (position.to(tl.int64)[:, None] * H + head) * D + dims[None, :]
    query = tl.load(q + place, mask=(position < length)[:, None], other=0.0)
    offset = head // (H // G) * D
    highest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    clear = first // BN * BN
    for start in range(0, clear, BN):
        acc, total, highest = _attend(
            acc, total, highest, query, k, v, start, offset, position, scale, False, BN
        )  # fmt: skip
    for start in range(clear, tl.minimum(first + BM, length), BN):
        acc, total, highest = _attend(
            acc, total, highest, query, k, v, start, offset, position, scale, True, BN
        )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=(position < length)[:, None])


def gather(source: Any, table: Any, target: Any, words: int) -> None:
    """Copy the blocks of ``table``, ``words`` elements each, into ``target`` one after the other."""
    gather_kernel[(table.shape[0],)](
        source, table, target, words, min(4096, triton.next_power_of_2(words)), num_warps=8
    )


def dense_attention(
    queries: Any, keys: Any, values: Any, out: Any, rows: int, tile: int, warps: int, stages: int
) -> None:
    """Write causal attention of ``queries`` [N, H, D] over ``keys`` and ``values`` [N, G, D] to ``out``."""
    length, heads, dim = queries.shape
    groups = keys.shape[1]
    k, v = (
        TensorDescriptor(one, [one.shape[0], groups * dim], [groups * dim, 1], [tile, dim]) for one in (keys, values)
    )
    dense_attention_kernel[(heads, triton.cdiv(length, rows))](
        queries, k, v, out, length, dim**-0.5 * LOG2E, heads, groups, dim, rows, tile, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
