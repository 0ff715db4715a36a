"""Attention of one new token per sequence over the paged pool, each context cut into pieces (split KV).

A program takes one sequence, one KV head with all query heads that share it, and one piece of the context. The last
program of a sequence and head to finish joins the pieces, so that there is no second launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """``splits``: pieces at most; ``fewest``: tokens of a piece at least; ``tile``: context tokens of one iteration."""

    splits: int
    fewest: int
    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["positions", "table_rows"])
def decode_attention_kernel(
    q, k, v, positions, table_rows, tables, table_stride, out, parts, stats, tickets, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, FEWEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale`` includes log2(e). A row whose table row is below 0 is padding: its output is zero."""
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    repeat: tl.constexpr = H // G
    table_row = tl.load(table_rows + row).to(tl.int64)
    length = tl.where(table_row < 0, 0, tl.load(positions + row) + 1)
    table = tables + tl.maximum(table_row, 0) * table_stride
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0) // BN * BN
    piece = tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), BN) * BN, FEWEST)
    low = begin + split * piece
    high = tl.minimum(low + piece, length)
    if (low < high) | (split == 0):
        heads = tl.arange(0, BH)
        dims = tl.arange(0, BD)
        q_ok = (heads < repeat)[:, None] & (dims < D)[None, :]
        query = tl.load(q + (row * H + group * repeat + heads)[:, None] * D + dims[None, :], mask=q_ok, other=0.0)
        highest = tl.full([BH], -float("inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BH, BD], tl.float32)
        for start in range(low, high, BN):
            position = start + tl.arange(0, BN)
            seen = position < high
            if WINDOW > 0:
                seen = seen & (position >= length - WINDOW)
            block = tl.load(table + position // BS, mask=position < high, other=0).to(tl.int64)
            base = ((block * BS + position % BS) * G + group) * D
            key = tl.load(k + base[None, :] + dims[:, None], mask=seen[None, :] & (dims < D)[:, None], other=0.0)
            value = tl.load(v + base[:, None] + dims[None, :], mask=seen[:, None] & (dims < D)[None, :], other=0.0)
            scores = tl.dot(query, key, input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            base_score = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            shrink = tl.exp2(highest - base_score)
            weights = tl.exp2(scores - base_score[:, None])
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
            highest = new_highest
        place = (row * H + group * repeat + heads)[:, None] * D + dims[None, :]
        if SPLITS == 1:
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + place, result.to(out.dtype.element_ty), mask=q_ok)
        else:
            used = tl.maximum(tl.cdiv(length - begin, piece), 1)
            if used == 1:
                result = acc / tl.where(total > 0, total, 1.0)[:, None]
                tl.store(out + place, result.to(out.dtype.element_ty), mask=q_ok)
            else:
                part = ((row * G + group) * SPLITS + split) * BH + heads
                tl.store(parts + part[:, None] * BD + dims[None, :], acc, mask=q_ok)
                tl.store(stats + part * 2, highest)
                tl.store(stats + part * 2 + 1, total)
                tl.debug_barrier()  # all of this program's stores come before its ticket
                ticket = tl.atomic_add(tickets + row * G + group, 1, sem="acq_rel", scope="gpu")
                if ticket == used - 1:
                    top = tl.full([BH], -float("inf"), tl.float32)
                    total = tl.zeros([BH], tl.float32)
                    acc = tl.zeros([BH, BD], tl.float32)
                    for other in range(0, used):
                        part = ((row * G + group) * SPLITS + other) * BH + heads
                        one_top = tl.load(stats + part * 2, cache_modifier=".cg")
                        one_total = tl.load(stats + part * 2 + 1, cache_modifier=".cg")
                        one_at = parts + part[:, None] * BD + dims[None, :]
                        one = tl.load(one_at, mask=q_ok, other=0.0, cache_modifier=".cg")
                        new_top = tl.maximum(top, one_top)
                        base_score = tl.where(new_top == -float("inf"), 0.0, new_top)
                        old_share = tl.exp2(top - base_score)
                        one_share = tl.exp2(one_top - base_score)
                        total = total * old_share + one_total * one_share
                        acc = acc * old_share[:, None] + one * one_share[:, None]
                        top = new_top
                    result = acc / tl.where(total > 0, total, 1.0)[:, None]
                    tl.store(out + place, result.to(out.dtype.element_ty), mask=q_ok)
                    tl.store(tickets + row * G + group, 0)


def scratch_sizes(rows: int, heads: int, groups: int, dim: int, splits: int) -> tuple[int, int, int]:
    """Return how many float32 of parts, float32 of stats and zeroed int32 of tickets ``rows`` sequences need."""
    pieces = rows * groups * splits * _padded_heads(heads, groups)
    return pieces * triton.next_power_of_2(dim), pieces * 2, rows * groups


def decode_attention(
    queries: Any, keys: Any, values: Any, positions: Any, table_rows: Any, tables: Any, out: Any,
    scratch: tuple[Any, Any, Any], block_size: int, window: int | None, exact: bool, tiling: DecodeTiling,
) -> None:  # fmt: skip
    """Write the attention of ``queries`` [N, H, D], one for each sequence, to ``out`` [N, H, D].

    A query at ``positions[i]`` attends to that position and those before it, by the block table in row
    ``table_rows[i]`` of ``tables`` [rows, blocks]; ``keys`` and ``values`` are [slots, G, D]. ``scratch``: see
    ``scratch_sizes``; tickets are zero before and after. ``exact``: float32 products without tf32.
    """
    rows, heads, dim = queries.shape
    groups = keys.shape[1]
    decode_attention_kernel[(groups, rows, tiling.splits)](
        queries, keys, values, positions, table_rows, tables, tables.stride(0), out, *scratch, dim**-0.5 * LOG2E,
        heads, groups, dim, triton.next_power_of_2(dim), block_size, _padded_heads(heads, groups), tiling.tile,
        window or 0, tiling.splits, max(tiling.fewest, tiling.tile), "ieee" if exact else "tf32",
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


def _padded_heads(heads: int, groups: int) -> int:
    """Return the rows of a product's tile: at least 16, which the matrix units need."""
    padded: int = max(16, triton.next_power_of_2(heads // groups))
    return padded
