"""Attention of chunks of prompts over the paged pool: tiles of consecutive queries of one sequence.

Context that every query of a tile sees is read without a mask; only what is left at its end, or at the edges of a
window, is masked. Tiles come sorted, the longest context first, so that the last ones to run are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """``rows``: queries of a tile; ``tile``: context tokens of one iteration."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


FAST = PrefillTiling(rows=128, tile=64, num_warps=4, num_stages=3)
"""For 16-bit types on the matrix units of Hopper."""

EXACT = PrefillTiling(rows=32, tile=32, num_warps=4, num_stages=1)
"""For float32 without tf32, which runs on the plain units."""


@triton.jit
def _attend(
    acc, total, highest, query, k, v, table, start, first, end, head_offset, position, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in ``BN`` tokens of context from ``start`` on."""
    context = start + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    if MASKED:
        block = tl.load(table + context // BS, mask=context < end, other=0).to(tl.int64)
    else:
        block = tl.load(table + context // BS).to(tl.int64)
    base = (block * BS + context % BS) * (G * D) + head_offset
    key_at = k + base[None, :] + dims[:, None]
    value_at = v + base[:, None] + dims[None, :]
    if MASKED:
        there = context < end
        key = tl.load(key_at, mask=there[None, :] & (dims < D)[:, None], other=0.0)
        value = tl.load(value_at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
    elif D == BD:
        key = tl.load(key_at)
        value = tl.load(value_at)
    else:
        key = tl.load(key_at, mask=(dims < D)[:, None], other=0.0)
        value = tl.load(value_at, mask=(dims < D)[None, :], other=0.0)
    scores = tl.dot(query, key, input_precision=PRECISION)
    if MASKED:
        seen = context[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (context[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores * scale, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base_score = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base_score[:, None])
    else:
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
        base_score = new_highest
        weights = tl.exp2(scores * scale - base_score[:, None])
    shrink = tl.exp2(highest - base_score)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, total, new_highest


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["tile_first_rows", "tile_counts", "tile_positions", "tile_tables"],
)
def prefill_attention_kernel(
    q, k, v, tile_first_rows, tile_counts, tile_positions, tile_tables, tables, table_stride, out, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one tile; a tile of no queries is padding. ``scale`` includes log2(e)."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    count = tl.load(tile_counts + tile)
    if count > 0:
        first_row = tl.load(tile_first_rows + tile).to(tl.int64)
        first = tl.load(tile_positions + tile)
        table = tables + tl.load(tile_tables + tile).to(tl.int64) * table_stride
        index = tl.arange(0, BM)
        dims = tl.arange(0, BD)
        position = first + index
        q_ok = (index < count)[:, None] & (dims < D)[None, :]
        place = ((first_row + index)[:, None] * H + head) * D + dims[None, :]
        query = tl.load(q + place, mask=q_ok, other=0.0)
        end = first + count
        head_offset = head // (H // G) * D
        highest = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        begin = 0
        clear = 0
        if WINDOW > 0:
            begin = tl.maximum(first - WINDOW + 1, 0) // BN * BN
            # the first token that the last query still sees begins what all see
            open_from = tl.cdiv(tl.maximum(end - WINDOW, 0), BN) * BN
            clear = tl.maximum((first + 1) // BN * BN, begin)
            edge = tl.minimum(open_from, clear)
            for start in range(begin, edge, BN):
                acc, total, highest = _attend(
                    acc, total, highest, query, k, v, table, start, first, end, head_offset, position, scale,
                    G, D, BD, BS, BN, WINDOW, True, PRECISION,
                )  # fmt: skip
            begin = edge
        else:
            clear = (first + 1) // BN * BN
        for start in range(begin, clear, BN):
            acc, total, highest = _attend(
                acc, total, highest, query, k, v, table, start, first, end, head_offset, position, scale,
                G, D, BD, BS, BN, WINDOW, False, PRECISION,
            )  # fmt: skip
        for start in range(clear, end, BN):
            acc, total, highest = _attend(
                acc, total, highest, query, k, v, table, start, first, end, head_offset, position, scale,
                G, D, BD, BS, BN, WINDOW, True, PRECISION,
            )  # fmt: skip
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=q_ok)


def prefill_attention(
    queries: Any, keys: Any, values: Any, tiles: Any, tables: Any, out: Any, block_size: int, window: int | None,
    exact: bool, tiling: PrefillTiling,
) -> None:  # fmt: skip
    """Write the attention of the queries in ``tiles`` to ``out``; ``queries`` and ``out`` are [N, H, D].

    ``tiles`` int32 [4, T]: first row, number of rows (at most ``tiling.rows``), position of the first, row in
    ``tables`` [rows, blocks]. ``keys`` and ``values`` are [slots, G, D] and hold the tiles' own tokens already.
    ``exact``: float32 products without tf32.
    """
    _, heads, dim = queries.shape
    groups = keys.shape[1]
    prefill_attention_kernel[(heads, tiles.shape[1])](
        queries, keys, values, tiles[0], tiles[1], tiles[2], tiles[3], tables, tables.stride(0), out,
        dim**-0.5 * LOG2E, heads, groups, dim, triton.next_power_of_2(dim), block_size, tiling.rows, tiling.tile,
        window or 0, "ieee" if exact else "tf32", num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
