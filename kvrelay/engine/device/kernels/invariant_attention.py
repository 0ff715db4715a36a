"""Attention in which a query's bits do not depend on the batch, nor on whether it is computed in a chunk or alone.

Every query goes through its context in tiles of one size from position 0 on, and in pieces of several tiles. A piece is
computed by itself, and pieces are joined in order. A step of few sequences has programs for pieces, and the last one to
finish joins them; otherwise one program computes all pieces of its queries. A tile of queries has one size too: the
query heads that share a KV head, for as many tokens as fit. A single token is a tile with one token. What a query does
not see changes nothing: its weights are zero. Multiplications are not fused with additions, so that the compiler cannot
choose either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class InvariantTiling:
    """``rows``: queries of a tile, all heads counted; ``tile`` and ``piece``: context tokens of each."""

    rows: int
    tile: int
    piece: int
    num_warps: int
    num_stages: int

    def tokens(self, repeat: int) -> int:
        """Return how many tokens a tile has of ``repeat`` query heads each."""
        padded = triton.next_power_of_2(repeat)
        per_token: int = self.rows // padded
        return per_token


FAST = InvariantTiling(rows=64, tile=64, piece=512, num_warps=4, num_stages=3)
"""For 16-bit types."""

WIDE = InvariantTiling(rows=64, tile=64, piece=512, num_warps=8, num_stages=2)
"""For heads of more than 128 elements."""

EXACT = InvariantTiling(rows=32, tile=32, piece=512, num_warps=4, num_stages=1)
"""For float32 without tf32."""

SPREAD = 16
"""Programs for the pieces of one sequence and KV head, in a step of few sequences."""


@triton.jit
def _attend(
    acc, total, highest, query, k, v, table, start, end, offset, position, scale,
    WORDS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in ``BN`` tokens of context from ``start`` on."""
    context = start + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    there = context < end
    block = tl.load(table + context // BS, mask=there, other=0).to(tl.int64)
    base = (block * BS + context % BS) * WORDS + offset
    key = tl.load(k + base[None, :] + dims[:, None], mask=there[None, :] & (dims < D)[:, None], other=0.0)
    value = tl.load(v + base[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
    scores = tl.dot(query, key, input_precision=PRECISION) * scale
    seen = context[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (context[None, :] > position[:, None] - WINDOW)
    scores = tl.where(seen, scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base_score = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base_score[:, None])
    shrink = tl.exp2(highest - base_score)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_highest


@triton.jit
def _piece(
    query, k, v, table, piece, begin, end, offset, position, scale, WORDS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the ``piece``-th piece: weighted values, sum of weights, highest score."""
    highest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(tl.maximum(piece * PIECE, begin), tl.minimum((piece + 1) * PIECE, end), BN):
        acc, total, highest = _attend(
            acc, total, highest, query, k, v, table, start, end, offset, position, scale,
            WORDS, D, BD, BS, BN, WINDOW, PRECISION,
        )  # fmt: skip
    return acc, total, highest


@triton.jit
def _join(acc, total, highest, one, one_total, one_highest):
    """Return what has been joined so far with the next piece. An empty piece changes nothing."""
    top = tl.maximum(highest, one_highest)
    base_score = tl.where(top == -float("inf"), 0.0, top)
    share, one_share = tl.exp2(highest - base_score), tl.exp2(one_highest - base_score)
    total = total * share + one_total * one_share
    acc = acc * share[:, None] + one * one_share[:, None]
    return acc, total, top


@triton.jit(
    do_not_specialize=["table_stride", "max_pieces"],
    do_not_specialize_on_alignment=["first_rows", "counts", "positions", "table_rows"],
)
def attention_kernel(
    q, k, v, first_rows, counts, positions, table_rows, tables, table_stride, out, parts, stats, tickets, max_pieces,
    scale, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr, SINGLES: tl.constexpr,
    SPREAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One KV head of one tile of queries, or with ``SPREAD`` every so manieth piece of it.

    ``SINGLES``: the tiles are single tokens, in the first rows; a table row below 0 is padding. Otherwise a tile of no
    tokens is padding. ``scale`` includes log2(e).
    """
    group = tl.program_id(0)
    tile = tl.program_id(1)
    repeat: tl.constexpr = H // G
    table_row = tl.load(table_rows + tile).to(tl.int64)
    first = tl.load(positions + tile)
    if SINGLES:
        first_row = tile.to(tl.int64)
        count = tl.where(table_row < 0, 0, 1)
    else:
        first_row = tl.load(first_rows + tile).to(tl.int64)
        count = tl.load(counts + tile)
    index = tl.arange(0, BM)
    dims = tl.arange(0, BD)
    token, head = index // BH, index % BH
    ok = ((token < count) & (head < repeat))[:, None] & (dims < D)[None, :]
    position = first + token
    place = ((first_row + token) * H + group * repeat + head)[:, None] * D + dims[None, :]
    table = tables + tl.maximum(table_row, 0) * table_stride
    query = tl.load(q + place, mask=ok, other=0.0)
    end = tl.where(count > 0, first + count, 0)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // BN * BN
    first_piece = begin // PIECE
    end_piece = tl.cdiv(end, PIECE)
    highest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if SPREAD == 1:
        for piece in range(first_piece, end_piece):
            one, one_total, one_highest = _piece(
                query, k, v, table, piece, begin, end, group * D, position, scale,
                G * D, D, BD, BS, BM, BN, PIECE, WINDOW, PRECISION,
            )  # fmt: skip
            acc, total, highest = _join(acc, total, highest, one, one_total, one_highest)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        written = ok
        if SINGLES:  # padding is zero
            written = ((token < 1) & (head < repeat))[:, None] & (dims < D)[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=written)
    else:
        split = tl.program_id(2)
        unit = tile.to(tl.int64) * G + group
        kept = (index < BH)[:, None] & (dims < D)[None, :]
        for piece in range(first_piece + split, end_piece, SPREAD):
            one, one_total, one_highest = _piece(
                query, k, v, table, piece, begin, end, group * D, position, scale,
                G * D, D, BD, BS, BM, BN, PIECE, WINDOW, PRECISION,
            )  # fmt: skip
            part = (unit * max_pieces + piece) * BH + index
            tl.store(parts + part[:, None] * BD + dims[None, :], one, mask=kept)
            tl.store(stats + part * 2, one_highest, mask=index < BH)
            tl.store(stats + part * 2 + 1, one_total, mask=index < BH)
        used = tl.maximum(tl.minimum(end_piece - first_piece, SPREAD), 1)
        if split < used:
            tl.debug_barrier()  # all of this program's stores come before its ticket
            ticket = tl.atomic_add(tickets + unit, 1, sem="acq_rel", scope="gpu")
            if ticket == used - 1:
                for piece in range(first_piece, end_piece):
                    part = (unit * max_pieces + piece) * BH + index
                    one_highest = tl.load(stats + part * 2, mask=index < BH, other=-float("inf"), cache_modifier=".cg")
                    one_total = tl.load(stats + part * 2 + 1, mask=index < BH, other=0.0, cache_modifier=".cg")
                    one_at = parts + part[:, None] * BD + dims[None, :]
                    one = tl.load(one_at, mask=kept, other=0.0, cache_modifier=".cg")
                    acc, total, highest = _join(acc, total, highest, one, one_total, one_highest)
                result = acc / tl.where(total > 0, total, 1.0)[:, None]
                tl.store(out + place, result.to(out.dtype.element_ty), mask=kept & (head < repeat)[:, None])
                tl.store(tickets + unit, 0)


def scratch_sizes(
    rows: int, max_len: int, heads: int, groups: int, dim: int, tiling: InvariantTiling
) -> tuple[int, int, int]:
    """Return how many float32 of parts, float32 of stats and zeroed int32 of tickets ``rows`` spread tokens need."""
    pieces = rows * groups * triton.cdiv(max_len, tiling.piece) * triton.next_power_of_2(heads // groups)
    return pieces * triton.next_power_of_2(dim), pieces * 2, rows * groups


def attention_of_singles(
    queries: Any, keys: Any, values: Any, positions: Any, table_rows: Any, tables: Any, out: Any,
    scratch: tuple[Any, Any, Any] | None, max_len: int, block_size: int, window: int | None, exact: bool,
    tiling: InvariantTiling,
) -> None:  # fmt: skip
    """Write the attention of ``queries`` [N, H, D], one of each sequence, to ``out`` [N, H, D].

    ``scratch``: see ``scratch_sizes``; tickets are zero before and after. None: no programs for pieces.
    """
    spread = 1 if scratch is None else SPREAD
    room = (out, out, tables) if scratch is None else scratch
    _launch(
        queries, keys, values, (table_rows, table_rows, positions, table_rows), tables, out, room, max_len, block_size,
        window, exact, tiling, True, spread,
    )  # fmt: skip


def attention_of_tiles(
    queries: Any, keys: Any, values: Any, tiles: Any, tables: Any, out: Any, block_size: int, window: int | None,
    exact: bool, tiling: InvariantTiling,
) -> None:  # fmt: skip
    """Write the attention of the queries in ``tiles`` to ``out``; ``queries`` and ``out`` are [N, H, D].

    ``tiles`` int32 [4, T]: first row, number of tokens (at most ``tiling.tokens``), position of the first, row in
    ``tables`` [rows, blocks].
    """
    of_tiles = tiles[0], tiles[1], tiles[2], tiles[3]
    room = (out, out, tables)
    _launch(queries, keys, values, of_tiles, tables, out, room, 0, block_size, window, exact, tiling, False, 1)


def _launch(
    queries: Any, keys: Any, values: Any, tiles: tuple[Any, Any, Any, Any], tables: Any, out: Any,
    scratch: tuple[Any, Any, Any], max_len: int, block_size: int, window: int | None, exact: bool,
    tiling: InvariantTiling, singles: bool, spread: int,
) -> None:  # fmt: skip
    _, heads, dim = queries.shape
    groups = keys.shape[1]
    count = queries.shape[0] if singles else tiles[0].shape[0]
    attention_kernel[(groups, count, spread)](
        queries, keys, values, *tiles, tables, tables.stride(0), out, *scratch, triton.cdiv(max_len, tiling.piece),
        dim**-0.5 * LOG2E, heads, groups, dim, triton.next_power_of_2(dim), block_size, tiling.rows, tiling.tile,
        triton.next_power_of_2(heads // groups), tiling.piece, window or 0, singles, spread,
        "ieee" if exact else "tf32", num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
