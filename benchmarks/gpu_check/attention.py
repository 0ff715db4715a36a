"""Attention alone, for the heads of an 8B model: several tilings of each kernel, and cuDNN's for comparison."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import torch

from gpu_check.context import Context
from kvrelay.engine.device.kernels.decode_attention import DecodeTiling, decode_attention, scratch_sizes
from kvrelay.engine.device.kernels.dense_attention import DenseTiling, dense_attention, gather
from kvrelay.engine.device.kernels.prefill_attention import PrefillTiling, prefill_attention
from kvrelay.engine.device.tiles import Chunk, DenseRoom, TileCutter

HEADS, GROUPS, DIM, BLOCK = 32, 8, 128, 16

DTYPE = "float16" if os.environ.get("TRITON_INTERPRET") == "1" else "bfloat16"
"""Triton's interpreter multiplies no bfloat16."""

PREFILL_TILINGS = [
    PrefillTiling(128, 64, 4, 3),
    PrefillTiling(128, 64, 4, 2),
    PrefillTiling(128, 128, 8, 3),
    PrefillTiling(64, 64, 4, 3),
]

DENSE_TILINGS = [DenseTiling(), DenseTiling(num_stages=2), DenseTiling(num_stages=4), DenseTiling(128, 8, 3)]
"""Of the kernel on gathered keys and values."""

DECODE_TILINGS = [
    DecodeTiling(1, 64),
    DecodeTiling(2, 4096),
    DecodeTiling(4, 2048),
    DecodeTiling(2, 512),
    DecodeTiling(2, 512, tile=128),
    DecodeTiling(4, 256, tile=128),
    DecodeTiling(8, 128, tile=128),
    DecodeTiling(16, 128),
    DecodeTiling(16, 128, tile=128),
    DecodeTiling(32, 64),
]


def run(context: Context) -> None:
    """Measure prefill at two lengths, then decode at the batches of the table."""
    for length in (20,) if context.tiny else (2048, 8192):
        _prefill(context, length)
    for batch, length in (
        ((2, 40),) if context.tiny else ((1, 1152), (8, 1152), (16, 1152), (32, 1152), (64, 1152), (256, 1152))
    ):
        _decode(context, batch, length)


def _pool(context: Context, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (context.random(num_blocks * BLOCK, GROUPS, DIM, dtype=DTYPE, scale=0.5) for _ in range(2))
    return keys, values


def _prefill(context: Context, length: int) -> None:
    blocks = -(-length // BLOCK)
    keys, values = _pool(context, blocks)
    device = context.torch_device
    order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    tables = torch.from_numpy(order).view(1, -1).to(device)
    queries = context.random(length, HEADS, DIM, dtype=DTYPE)
    out = torch.empty_like(queries)
    flops = 2 * 2 * HEADS * DIM * length * (length + 1) / 2
    best = context.gemm_flops_per_s / 1e12
    reference = _sdpa(context, queries, keys, values, tables, flops)
    for tiling in PREFILL_TILINGS[:1] if context.tiny else PREFILL_TILINGS:
        rows = [
            (first, min(tiling.rows, length - first), first, 0) for first in reversed(range(0, length, tiling.rows))
        ]
        tiles = torch.tensor(np.array(rows, np.int32).T.copy()).to(device)
        work = partial(prefill_attention, queries, keys, values, tiles, tables, out, BLOCK, None, False, tiling)
        name = f"prefill {length}, rows {tiling.rows} tile {tiling.tile} warps {tiling.num_warps}"
        name += f" stages {tiling.num_stages}"
        out.fill_(float("nan"))
        try:
            seconds = context.seconds_in_graph([work] * 3, repeats=5)
        except Exception as error:  # a tiling that this card cannot run says so; the others go on
            context.report.add("attention", name, f"failed: {repr(error)[:150]}")
            continue
        distance = _distance(out, reference)
        context.report.add(
            "attention",
            name,
            flops / seconds / 1e12,
            "TFLOP/s",
            best,
            f"{seconds * 1e6:.0f} us, distance {distance:.1e}",
        )
    _dense(context, queries, keys, values, tables, reference, flops)


def _dense(
    context: Context, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
    reference: torch.Tensor, flops: float,
) -> None:  # fmt: skip
    """Measure the kernel on gathered keys and values, and the gathering that it needs."""
    length, device = queries.shape[0], context.torch_device
    for tiling in DENSE_TILINGS[:1] if context.tiny else DENSE_TILINGS:
        cut = TileCutter(128, DenseRoom(-(-length // tiling.tile) * tiling.tile, 1, tiling.tile))
        _, dense, piece_list = cut.cut([Chunk(0, length, 0, 0)])
        tiles, pieces = (torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in (dense, piece_list))
        room = torch.full((2, pieces.shape[1] * tiling.tile, GROUPS, DIM), float("nan"), device=device)
        room = room.to(keys.dtype)
        gathered = room[0], room[1]
        out = torch.full_like(queries, float("nan"))
        name = f"prefill {length}, dense, tile {tiling.tile} warps {tiling.num_warps} stages {tiling.num_stages}"
        gathering = partial(gather, keys, values, pieces, tables, gathered, BLOCK, tiling.tile)
        work = partial(dense_attention, queries, gathered, tiles, out, tiling)
        try:
            gather_seconds = context.seconds_in_graph([gathering] * 3, repeats=5)
            seconds = context.seconds_in_graph([work] * 3, repeats=5)
        except Exception as error:
            context.report.add("attention", name, f"failed: {repr(error)[:150]}")
            continue
        note = f"{seconds * 1e6:.0f} us and {gather_seconds * 1e6:.0f} us to gather, "
        note += f"distance {_distance(out, reference):.1e}"
        context.report.add("attention", name, flops / seconds / 1e12, "TFLOP/s", context.gemm_flops_per_s / 1e12, note)


def _distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.float() - reference.float()).norm() / reference.float().norm())


def _sdpa(
    context: Context, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
    flops: float,
) -> torch.Tensor:  # fmt: skip
    """Measure torch's attention on contiguous keys and values; return its result [length, H, D]."""
    length = queries.shape[0]
    slots = (tables[0][:, None].long() * BLOCK + torch.arange(BLOCK, device=queries.device)).reshape(-1)[:length]
    parts = [one.transpose(0, 1)[None].contiguous() for one in (queries, keys[slots], values[slots])]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, *parts, is_causal=True, enable_gqa=True)
    out = attend()
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") if context.device == "gpu" else ():
        name = f"prefill {length}, torch's {backend.lower()} on contiguous keys"
        try:
            from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

            repeated = [parts[0], *(one.repeat_interleave(HEADS // GROUPS, 1) for one in parts[1:])]
            with sdpa_kernel(getattr(SDPBackend, backend)):
                work = partial(torch.nn.functional.scaled_dot_product_attention, *repeated, is_causal=True)
                seconds = context.seconds_in_graph([work] * 3, repeats=5)
            context.report.add("attention", name, flops / seconds / 1e12, "TFLOP/s", None, f"{seconds * 1e6:.0f} us")
        except Exception as error:
            context.report.add("attention", name, f"failed: {repr(error)[:150]}")
    result: torch.Tensor = out[0].transpose(0, 1).contiguous()
    return result


def _decode(context: Context, batch: int, length: int) -> None:
    """Measure launches over several pools, so that the cache holds none of them."""
    width = -(-length // BLOCK)
    token_bytes = 2 * GROUPS * DIM * 2
    bytes_read = batch * length * token_bytes
    pools = [
        _pool(context, batch * width) for _ in range(2 if context.tiny else max(2, min(16, int(2e9 / bytes_read))))
    ]
    device = context.torch_device
    order = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    tables = torch.from_numpy(order).view(batch, width).to(device)
    positions = torch.full((batch,), length - 1, dtype=torch.int32, device=device)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    queries = context.random(batch, HEADS, DIM, dtype=DTYPE)
    limit = bytes_read / context.copy_bytes_per_s * 1e6
    reference = None
    for tiling in DECODE_TILINGS[:2] if context.tiny else DECODE_TILINGS:
        sizes = scratch_sizes(batch, HEADS, GROUPS, DIM, tiling.splits)
        if 4 * sizes[0] > 4e9:
            continue
        scratch = tuple(
            torch.zeros(size, dtype=dtype, device=device)
            for size, dtype in zip(sizes, (torch.float32, torch.float32, torch.int32), strict=True)
        )
        outs = [torch.empty_like(queries) for _ in pools]
        works = [
            partial(
                decode_attention,
                queries,
                keys,
                values,
                positions,
                rows,
                tables,
                out,
                scratch,
                BLOCK,
                None,
                False,
                tiling,
            )
            for (keys, values), out in zip(pools, outs, strict=True)
        ]
        name = f"decode {batch} x {length}, splits {tiling.splits} fewest {tiling.fewest} tile {tiling.tile}"
        name += f" warps {tiling.num_warps} stages {tiling.num_stages}"
        try:
            seconds = context.seconds_in_graph(works, repeats=8)
        except Exception as error:
            context.report.add("attention", name, f"failed: {repr(error)[:150]}")
            continue
        reference = outs[0] if reference is None else reference
        distance = _distance(outs[0], reference)
        context.report.add(
            "attention", name, seconds * 1e6, "us", limit,
            f"{bytes_read / seconds / 1e12:.2f} TB/s, distance to the first {distance:.1e}",
        )  # fmt: skip
