from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import Case, Shape, close, copy_of, operations

from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.kernels import HeadNorms
from kvrelay.kv_pool.block_digest import digest_blocks
from kvrelay.kv_pool.copy_kernel import Place, move_blocks

SHAPES = [
    Shape(),
    Shape(heads=6, groups=3, dim=12),
    Shape(heads=7, groups=1, dim=8, block_size=4),
    Shape(dtype="float16"),
]
SPANS = [(40, 1), (0, 1), (15, 1), (0, 37), (21, 5), (100, 70)]


def tolerance(shape: Shape) -> float:
    return 1e-6 if shape.dtype == "float32" else 2e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chosen", [False, True])
def test_rms_norm(shape: Shape, chosen: bool) -> None:
    ours, theirs = operations(shape)
    case = Case(shape, SPANS, 16)
    x, weight = case.random(9, 24), case.random(24, seed=2)
    rows = torch.tensor([3, 8, 3], dtype=torch.int32) if chosen else None
    assert close(ours.rms_norm(x, weight, 1e-6, rows), theirs.rms_norm(x, weight, 1e-6, rows), tolerance(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(shape: Shape) -> None:
    ours, theirs = operations(shape)
    x = Case(shape, SPANS, 16).random(5, 2 * 20)
    assert close(ours.silu_mul(x), theirs.silu_mul(x), tolerance(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_takes_sampled_tokens_where_the_host_does_not_know_them(shape: Shape) -> None:
    ours, theirs = operations(shape)
    case = Case(shape, SPANS, 16)
    step, _, _ = case.build()
    step.tokens[1] = -1
    last, table = torch.arange(40, 48, dtype=torch.int32), case.random(50, 20)
    result = ours.embed(step, last, table)
    assert torch.equal(result, theirs.embed(step, last, table))
    assert torch.equal(result[1], table[41])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_writing_of_kv(shape: Shape, normed: bool) -> None:
    ours, theirs = operations(shape)
    case = Case(shape, SPANS, 16)
    step, _, layer = case.build()
    step.slots[2] = -1
    qkv = case.random(step.shape.rows, (shape.heads + 2 * shape.groups) * shape.dim)
    norms = HeadNorms(case.random(shape.dim, seed=3), case.random(shape.dim, seed=4)) if normed else None
    pools = copy_of(layer), copy_of(layer)
    queries = [
        do.apply_rope_and_write_kv(qkv, norms, 1e-6, step, pool) for do, pool in zip((ours, theirs), pools, strict=True)
    ]
    assert close(queries[0], queries[1], tolerance(shape))
    for mine, reference in zip(*pools, strict=True):
        assert close(mine, reference, tolerance(shape))


@pytest.mark.parametrize("window", [None, 1, 19, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_of_ragged_steps(shape: Shape, window: int | None) -> None:
    ours, theirs = operations(shape)
    step, tables, layer = Case(shape, SPANS, ours.tile_rows).build()
    queries = Case(shape, SPANS, 16).random(step.shape.rows, shape.heads, shape.dim)
    result = ours.attention(queries, layer, step, tables, window)
    assert close(result, theirs.attention(queries, layer, step, tables, window), tolerance(shape))


def test_decode_attention_joins_pieces_and_leaves_its_tickets_at_zero() -> None:
    from kvrelay.engine.device.kernels.decode_attention import DecodeTiling

    shape = Shape()
    ours, theirs = operations(shape)
    ours.decode_tilings = ((1 << 30, DecodeTiling(splits=5, fewest=32)),)
    step, tables, layer = Case(shape, [(200, 1), (31, 1), (0, 1), (129, 1)], 16).build()
    queries = Case(shape, SPANS, 16).random(step.shape.rows, shape.heads, shape.dim)
    step.table_rows[2] = -1
    for _ in range(2):
        result = ours.attention(queries, layer, step, tables, None)
        assert close(result, theirs.attention(queries, layer, step, tables, None), 1e-6)
        assert not result[2].any()
    ((_, _, tickets),) = ours._scratch.values()
    assert not tickets.any()


def test_entries_of_tables() -> None:
    ours, _ = operations(Shape())
    table = torch.zeros((3, 4), dtype=torch.int32)
    ours.set_entries(table, torch.tensor([[5, 11], [7, 9]], dtype=torch.int32))
    assert table.tolist() == [[0] * 4, [0, 7, 0, 0], [0, 0, 0, 9]]


DENSE_SHAPES = [
    Shape(dtype="float16"),
    Shape(heads=6, groups=2, dim=32, block_size=4, dtype="float16"),
    Shape(heads=2, groups=1, dim=64, block_size=32, dtype="float16", max_len=300),
]


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
@pytest.mark.parametrize(
    "spans",
    [
        [(40, 1), (0, 37), (21, 5), (100, 70), (0, 128), (63, 65), (64, 64)],
        [(0, 200)],
        [(127, 1), (0, 1), (1, 150), (0, 5), (62, 66)],
    ],
)
def test_attention_over_gathered_contexts(shape: Shape, spans: list[tuple[int, int]]) -> None:
    """Chunks of fewer than 30 tokens, and those for which there is no room, are attended to where their blocks are."""
    ours, theirs = operations(shape)
    room = DenseRoom(capacity=512, fewest=30, piece=64)
    ours.room = room
    step, tables, layer = Case(shape, spans, ours.tile_rows, room=room).build()
    assert step.shape.dense_tiles
    queries = Case(shape, spans, 16).random(step.shape.rows, shape.heads, shape.dim)
    used = torch.zeros(len(layer.keys), dtype=torch.bool)
    for row, (before, count) in enumerate(spans):
        position = torch.arange(before + count)
        used[tables[row][position // shape.block_size] * shape.block_size + position % shape.block_size] = True
    for one in layer:
        one[~used] = float("nan")  # what was in the pool before must not matter
    plain, _, _ = Case(shape, spans, theirs.tile_rows).build()
    ours._gathered = torch.full((2, 512, shape.groups, shape.dim), float("nan"), dtype=torch.float16)
    expected = theirs.attention(queries, layer, plain, tables, None)
    assert close(ours.attention(queries, layer, step, tables, None), expected, 2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_broken_rows(shape: Shape) -> None:
    ours, theirs = operations(shape)
    x = Case(shape, SPANS, 16).random(6, 24)
    x[1, 3], x[2, 23], x[4, 0] = float("nan"), float("inf"), float("-inf")
    assert ours.broken_rows(x).tolist() == theirs.broken_rows(x).tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("num_words", [33, 96, 2048])
def test_blocks_are_copied_and_digested_wherever_they_lie(num_words: int) -> None:
    rng = np.random.default_rng(num_words)
    source = rng.integers(-(1 << 62), 1 << 62, (6, 10, num_words))
    target, digests = np.zeros((8, 12, num_words), np.int64), np.zeros((2, 4, 3), np.int64)
    sources, targets = np.array([7, 1, 3], np.int32), np.array([2, 11, 0], np.int32)
    from_place = Place(source.ctypes.data, 10, 2, sources.ctypes.data)
    to_place = Place(target.ctypes.data, 12, 4, targets.ctypes.data)
    move_blocks(from_place, to_place, digests[0].ctypes.data, 4, 3, num_words)
    move_blocks(from_place, None, digests[1].ctypes.data, 4, 3, num_words)
    expected = np.zeros_like(target)
    expected[4:8, targets] = source[2:6, sources]
    assert np.array_equal(target, expected)
    assert np.array_equal(digests, [digest_blocks(source[2:6, sources])] * 2)
