"""Attention of long chunks of prompts over contexts that were gathered from the pool into one piece each.

Gathering costs one pass over the context's keys and values; afterwards a tile of them is one load by descriptor, which
the copy engine does, instead of many pointers. Contexts begin at multiples of ``tile`` tokens, and what a last tile has
beyond its context is zero. There are no windows, and heads have a power of 2 of elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634

_STEP = 8
"""Tokens that one program gathers."""


@dataclass(frozen=True, slots=True)
class DenseTiling:
    """``tile``: queries of a tile, context tokens of one iteration, and of a piece."""

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["piece_tables", "piece_positions", "piece_ends"],
)
def gather_kernel(
    k, v, piece_tables, piece_positions, piece_ends, tables, table_stride, k_out, v_out, WORDS: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A few tokens of one piece: their keys and values, or zero beyond the end of the context."""
    piece = tl.program_id(0)
    index = tl.program_id(1) * STEP + tl.arange(0, STEP)
    position = tl.load(piece_positions + piece) + index
    there = position < tl.load(piece_ends + piece)
    table = tables + tl.load(piece_tables + piece).to(tl.int64) * table_stride
    block = tl.load(table + position // BS, mask=there, other=0).to(tl.int64)
    source = (block * BS + position % BS)[:, None] * WORDS
    target = (piece.to(tl.int64) * TILE + index)[:, None] * WORDS
    for start in range(0, WORDS, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = column < WORDS
        key = tl.load(k + source + column, mask=there[:, None] & inside, other=0.0)
        value = tl.load(v + source + column, mask=there[:, None] & inside, other=0.0)
        tl.store(k_out + target + column, key, mask=inside)
        tl.store(v_out + target + column, value, mask=inside)


@triton.jit
def _attend(
    acc, total, highest, query, k, v, base, start, offset, position, scale, MASKED: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Take in ``BN`` tokens of context from ``start`` on."""
    key = k.load([base + start, offset])
    scores = tl.dot(query, key.T)
    if MASKED:
        context = start + tl.arange(0, BN)
        scores = tl.where(context[None, :] <= position[:, None], scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    value = v.load([base + start, offset])
    acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, total, new_highest


@triton.jit(do_not_specialize_on_alignment=["tile_first_rows", "tile_counts", "tile_positions", "tile_bases"])
def dense_attention_kernel(
    q, k, v, tile_first_rows, tile_counts, tile_positions, tile_bases, out, scale, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One head of one tile; a tile of no queries is padding. ``scale`` includes log2(e)."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    count = tl.load(tile_counts + tile)
    if count > 0:
        first_row = tl.load(tile_first_rows + tile).to(tl.int64)
        first = tl.load(tile_positions + tile)
        base = tl.load(tile_bases + tile)
        index = tl.arange(0, BM)
        dims = tl.arange(0, D)
        position = first + index
        place = ((first_row + index)[:, None] * H + head) * D + dims[None, :]
        query = tl.load(q + place, mask=(index < count)[:, None], other=0.0)
        offset = head // (H // G) * D
        highest = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        clear = (first + 1) // BN * BN  # all queries see what is before it
        for start in range(0, clear, BN):
            acc, total, highest = _attend(
                acc, total, highest, query, k, v, base, start, offset, position, scale, False, BN
            )  # fmt: skip
        for start in range(clear, first + count, BN):
            acc, total, highest = _attend(
                acc, total, highest, query, k, v, base, start, offset, position, scale, True, BN
            )  # fmt: skip
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place, result, mask=(index < count)[:, None])


def gather(
    keys: Any, values: Any, pieces: Any, tables: Any, gathered: tuple[Any, Any], block_size: int, tile: int
) -> None:
    """Copy the contexts in ``pieces`` int32 [3, P] from ``keys`` and ``values`` [slots, G, D] to ``gathered``.

    ``pieces``: row in ``tables`` [rows, blocks], position of the first of ``tile`` tokens, end of the context.
    ``gathered`` are two of [at least P * tile, G, D], and ``tile`` is a multiple of 8.
    """
    words = keys.shape[1] * keys.shape[2]
    block = min(1024, triton.next_power_of_2(words))
    gather_kernel[(pieces.shape[1], tile // _STEP)](
        keys, values, pieces[0], pieces[1], pieces[2], tables, tables.stride(0), *gathered, words, block, block_size,
        tile, _STEP, num_warps=8,
    )  # fmt: skip


def dense_attention(queries: Any, gathered: tuple[Any, Any], tiles: Any, out: Any, tiling: DenseTiling) -> None:
    """Write causal attention of the queries in ``tiles`` to ``out``; ``queries`` and ``out`` are [N, H, D].

    ``tiles`` int32 [4, U]: first row, number of rows (at most ``tiling.tile``), position of the first, token of
    ``gathered`` where the context begins.
    """
    _, heads, dim = queries.shape
    groups = gathered[0].shape[1]
    k, v = (
        TensorDescriptor(one, [one.shape[0], groups * dim], [groups * dim, 1], [tiling.tile, dim]) for one in gathered
    )
    dense_attention_kernel[(heads, tiles.shape[1])](
        queries, k, v, tiles[0], tiles[1], tiles[2], tiles[3], out, dim**-0.5 * LOG2E, heads, groups, dim, tiling.tile,
        tiling.tile, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
