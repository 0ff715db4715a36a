"""Kernels whose bits for a row depend on that row alone: equal to references, and to themselves in other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreting import sum_in_order
from steps import Case, Shape, close, step_of_one_sequence

from kvrelay.engine.device import invariant
from kvrelay.engine.device.invariant import InvariantOperations, InvariantProjections
from kvrelay.engine.device.kernels import invariant_attention, invariant_gemm
from kvrelay.engine.device.kernels.invariant_attention import InvariantTiling
from kvrelay.engine.device.kernels.invariant_gemm import EXACT, FAST, GemmTiling, pieces_of
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.torch_operations import TorchOperations
from kvrelay.engine.device.weights import Linear
from kvrelay.errors import ConfigError

SHAPES = [Shape(heads=6, groups=2, dim=12, block_size=4, dtype="float16"), Shape(heads=7, groups=1, dim=8)]
SMALL = InvariantTiling(rows=16, tile=16, piece=32, num_warps=4, num_stages=1)
WINDOWS = [None, 19]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_in_order(monkeypatch.setattr)
    monkeypatch.setattr(invariant_attention, "SPREAD", 2)


def operations(shape: Shape) -> InvariantOperations:
    made = InvariantOperations(TorchFramework("cpu"), shape.head_shape(), shape.limits())
    made.tiling = SMALL
    made.tile_rows = SMALL.tokens(shape.heads // shape.groups)
    return made


def tolerance(dtype: str) -> float:
    return 1e-6 if dtype == "float32" else 2e-3


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0, 16])
def test_attention_equals_its_reference(
    shape: Shape, window: int | None, spread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariant, "MOST_SPREAD", spread)
    ours = operations(shape)
    theirs = TorchOperations(TorchFramework("cpu"), shape.head_shape(), shape.limits())
    spans = [(40, 1), (0, 1), (31, 1), (32, 1), (100, 1), (0, 37), (21, 5), (60, 20)]
    case = Case(shape, spans, ours.tile_rows)
    step, tables, layer = case.build()
    step.table_rows[1] = -1
    queries = case.random(step.shape.rows, shape.heads, shape.dim)
    result = ours.attention(queries, layer, step, tables, window)
    assert close(result, theirs.attention(queries, layer, step, tables, window), tolerance(shape.dtype))
    assert not result[1].any()
    if ours._pieces is not None:
        assert not ours._pieces[2].any()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_attends_alike_alone_and_in_any_chunk(
    shape: Shape, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, length = operations(shape), 75
    case = Case(shape, [(0, length)], ours.tile_rows)
    whole, tables, layer = case.build()
    queries = case.random(whole.shape.rows, shape.heads, shape.dim)
    expected = ours.attention(queries, layer, whole, tables, window)[:length]

    def attended(spans: list[tuple[int, int]], spread: int) -> torch.Tensor:
        """Attend from rows of the same sequence."""
        monkeypatch.setattr(invariant, "MOST_SPREAD", spread)
        step = step_of_one_sequence(spans, ours.tile_rows)
        chosen = torch.cat([queries[before : before + count] for before, count in spans])
        return ours.attention(chosen, layer, step, tables, window)

    for chunk, first in [(7, 3), (33, 0), (length - 1, 1)]:
        spans = [(before, min(chunk, length - before)) for before in range(first, length, chunk)]
        spans.sort(key=lambda span: span[1] > 1)
        rows = torch.cat([torch.arange(before, before + count) for before, count in spans])
        assert torch.equal(attended(spans, 16), expected[rows]), (chunk, first)
    positions = [0, 31, 32, 63, 64, 74]
    for spread in (0, 16):
        assert torch.equal(attended([(position, 1) for position in positions], spread), expected[positions])


# ---------------------------------------------------------------- products


SIZES = [(40, 24), (20, 130)]
TILING = GemmTiling(rows=16, columns=16, depth=16, num_warps=4, num_stages=1)


def projections(dtype: str, monkeypatch: pytest.MonkeyPatch) -> InvariantProjections:
    monkeypatch.setattr(invariant_gemm, "SHORTEST_PIECE", 32)
    monkeypatch.setattr(invariant_gemm, "MOST_SPREAD_ROWS", 20)
    made = InvariantProjections(TorchFramework("cpu"), None, 1e-6, dtype)  # type: ignore[arg-type]
    made.tiling = TILING
    return made


def made(dtype: str, *shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_products(dtype: str, size: tuple[int, int], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, depth = size
    project = projections(dtype, monkeypatch)
    linear = Linear(made(dtype, columns, depth), made(dtype, columns, seed=1) if biased else None)
    x, residual = made(dtype, 37, depth, seed=2), made(dtype, 37, columns, seed=3)
    product = x.float() @ linear.weight.float().T + (0 if linear.bias is None else linear.bias.float())
    whole, added = project._product(x, linear, "float32"), residual.clone()
    project.add(added, x, linear)
    assert close(whole, product, 1e-6)
    assert close(added, residual.float() + product, tolerance(dtype))
    rounded = project._product(x, linear, dtype)
    assert torch.equal(rounded, whole.to(rounded.dtype))
    for count in (1, 16, 17, 20, 21):
        for first in {0, 37 - count}:
            rows = slice(first, first + count)
            assert torch.equal(project._product(x[rows], linear, "float32"), whole[rows]), (first, count)
            mine = residual[rows].clone()
            project.add(mine, x[rows], linear)
            assert torch.equal(mine, added[rows])
    for _, tickets in project._scratch.values():
        assert not tickets.any()


def test_more_heads_than_a_tile_has_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 query heads that share a KV head are more than 32"):
        InvariantOperations(TorchFramework("cpu"), Shape(heads=64, groups=1).head_shape(), Shape().limits())


def test_pieces_fill_the_device_and_cover_the_inner_dimension() -> None:
    for columns, depth in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (96, 192)]:
        for tiling in (FAST, EXACT):
            pieces, length = pieces_of(columns, depth, tiling)
            assert (pieces - 1) * length < depth <= pieces * length
            assert length % tiling.depth == 0
    assert pieces_of(4096, 14336, FAST) == (4, 3584)
    assert pieces_of(128256, 4096, FAST) == (1, 4096)
