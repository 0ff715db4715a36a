"""Products ``x @ weight.T`` in which a row's bits do not depend on how many rows there are, or where it is among them.

The inner dimension is cut into pieces whose number depends on the weight alone. A piece is summed in order by one
program, in a tile of one size for any number of rows, and pieces are added in order. With few rows each piece has a
program of its own, and the last one to finish adds them; with many rows one program computes all pieces of its tile.
Both do the same additions. Multiplications are not fused with additions, so that the compiler cannot choose either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class GemmTiling:
    """A tile's rows, columns and steps of the inner dimension."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FAST = GemmTiling(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
"""For 16-bit types. With one row, a tile still takes less time to multiply than to read."""

EXACT = GemmTiling(rows=64, columns=64, depth=32, num_warps=4, num_stages=2)
"""For float32 without tf32."""

PROGRAMS = 128
"""Programs that fill a device of the Hopper generation: pieces are made until a product of few rows has as many."""

SHORTEST_PIECE = 512

MOST_SPREAD_ROWS = 256
"""Rows up to which pieces are computed by programs of their own."""


@triton.jit
def _piece(
    x, weight, rows, columns, row_ok, piece, N: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the sum over the ``piece``-th piece."""
    acc = tl.zeros([BM, BN], tl.float32)
    low = piece * PIECE
    for start in range(low, tl.minimum(low + PIECE, K), BK):
        inner = start + tl.arange(0, BK)
        x_at = x + rows[:, None] * K + inner[None, :]
        weight_at = weight + columns[None, :] * K + inner[:, None]
        if K % BK == 0:
            left = tl.load(x_at, mask=row_ok[:, None], other=0.0)
        else:
            left = tl.load(x_at, mask=row_ok[:, None] & (inner < K)[None, :], other=0.0)
        if K % BK == 0 and N % BN == 0:
            right = tl.load(weight_at)
        else:
            right = tl.load(weight_at, mask=(columns < N)[None, :] & (inner < K)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(total, bias, out, rows, columns, row_ok, N: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr):
    """Write ``total``, with the bias, to ``out`` or add it to what is there."""
    ok = row_ok[:, None] & (columns < N)[None, :]
    place = out + rows[:, None] * N + columns[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        total += tl.load(place, mask=ok, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x, weight, bias, out, parts, tickets, M, N: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, SPREAD: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile, or one piece of it. Tiles are taken in bands of ``BAND`` tiles of rows, which share weights."""
    tile = tl.program_id(0)
    across: tl.constexpr = (N + BN - 1) // BN
    first = tile // (BAND * across) * BAND
    height = tl.minimum(tl.cdiv(M, BM) - first, BAND)
    down = first + tile % (BAND * across) % height
    over = tile % (BAND * across) // height
    rows = (down * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (over * BN + tl.arange(0, BN)).to(tl.int64)
    row_ok = rows < M
    total = tl.zeros([BM, BN], tl.float32)
    if SPREAD:
        piece = tl.program_id(1)
        acc = _piece(x, weight, rows, columns, row_ok, piece, N, K, PIECE, BM, BN, BK, PRECISION)
        place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        mine = parts + (down * across + over) * PIECES * (BM * BN) + place
        tl.store(mine + piece * (BM * BN), acc, mask=row_ok[:, None])
        tl.debug_barrier()  # all of this program's stores come before its ticket
        ticket = tl.atomic_add(tickets + down * across + over, 1, sem="acq_rel", scope="gpu")
        if ticket == PIECES - 1:
            for other in range(0, PIECES):
                total += tl.load(mine + other * (BM * BN), mask=row_ok[:, None], other=0.0, cache_modifier=".cg")
            _finish(total, bias, out, rows, columns, row_ok, N, HAS_BIAS, ADDS)
            tl.store(tickets + down * across + over, 0)
    else:
        for piece in range(0, PIECES):
            total += _piece(x, weight, rows, columns, row_ok, piece, N, K, PIECE, BM, BN, BK, PRECISION)
        _finish(total, bias, out, rows, columns, row_ok, N, HAS_BIAS, ADDS)


def pieces_of(columns: int, depth: int, tiling: GemmTiling) -> tuple[int, int]:
    """Return into how many pieces the inner dimension ``depth`` of a weight of ``columns`` is cut, and their length."""
    tiles = triton.cdiv(columns, tiling.columns)
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, tiles))
    pieces = max(1, min(wanted, depth // SHORTEST_PIECE))
    length = triton.cdiv(triton.cdiv(depth, pieces), tiling.depth) * tiling.depth
    return triton.cdiv(depth, length), length


def scratch_sizes(columns: int, depth: int, tiling: GemmTiling) -> tuple[int, int]:
    """Return how many float32 of parts and zeroed int32 of tickets a product of up to MOST_SPREAD_ROWS rows needs."""
    tiles = triton.cdiv(MOST_SPREAD_ROWS, tiling.rows) * triton.cdiv(columns, tiling.columns)
    pieces, _ = pieces_of(columns, depth, tiling)
    if pieces == 1:
        return 4, 4
    return tiles * pieces * tiling.rows * tiling.columns, tiles


def gemm(
    x: Any, weight: Any, bias: Any | None, out: Any, scratch: tuple[Any, Any], adds: bool, exact: bool,
    tiling: GemmTiling,
) -> None:  # fmt: skip
    """Write ``x @ weight.T + bias`` to ``out`` [M, N], or add it, for x [M, K] and weight [N, K].

    ``scratch``: see ``scratch_sizes``; tickets are zero before and after. ``exact``: float32 products without tf32.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    pieces, length = pieces_of(columns, depth, tiling)
    spread = pieces > 1 and rows <= MOST_SPREAD_ROWS
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(columns, tiling.columns)
    gemm_kernel[(tiles, pieces if spread else 1)](
        x, weight, x if bias is None else bias, out, *scratch, rows, columns, depth, length, pieces, spread,
        bias is not None, adds, tiling.rows, tiling.columns, tiling.depth, 8, "ieee" if exact else "tf32",
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=False,
        maxnreg=128 if spread else None,  # so that two programs fit on a multiprocessor
    )  # fmt: skip
