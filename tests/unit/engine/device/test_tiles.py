"""Tiles of chunks: every row is in one, and gathered contexts lie one after the other."""

from __future__ import annotations

import numpy as np

from kvrelay.engine.decoder_config import parse_decoder_config
from kvrelay.engine.device.load import chunk_graphs
from kvrelay.engine.device.tiles import Chunk, DenseRoom, TileCutter

CHUNKS = [Chunk(3, 5, 21, 0), Chunk(8, 70, 100, 1), Chunk(78, 64, 64, 2), Chunk(142, 200, 0, 3), Chunk(342, 40, 7, 4)]


def rows_of(tiles: np.ndarray) -> list[tuple[int, int]]:
    """Return row and position of every row of ``tiles``."""
    return [(row + index, position + index) for row, count, position, _ in tiles.T.tolist() for index in range(count)]


def test_every_row_is_in_one_tile_and_long_contexts_come_first() -> None:
    for room in (None, DenseRoom(capacity=512, fewest=64, piece=64), DenseRoom(capacity=256, fewest=1, piece=32)):
        cutter = TileCutter(16, room)
        tiles = cutter.cut(CHUNKS)
        rows = sorted(rows_of(tiles.paged) + rows_of(tiles.dense))
        assert rows == [
            (one.first_row + index, one.position + index) for one in CHUNKS for index in range(one.num_rows)
        ]
        assert all((np.diff(one[2]) <= 0).all() for one in (tiles.paged, tiles.dense))
        sizes = [one.shape[1] for one in tiles]
        most = cutter.most(sum(one.num_rows for one in CHUNKS), len(CHUNKS))
        assert all(size <= limit for size, limit in zip(sizes, most, strict=True))


def test_contexts_are_gathered_piece_by_piece() -> None:
    tiles = TileCutter(16, DenseRoom(capacity=512, fewest=64, piece=64)).cut(CHUNKS)
    assert tiles.pieces.T.tolist() == [
        *([1, first, 170] for first in (0, 64, 128)),
        *([2, first, 128] for first in (0, 64)),
    ], "there is no room left for the chunk of 200, and the others are short"
    assert {(int(row) < 78, int(base)) for row, _, _, base in tiles.dense.T} == {(True, 0), (False, 192)}


def test_steps_are_graphs_where_launches_would_bound_them() -> None:
    shape = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "vocab_size": 1000}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    small = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    limits = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    of_large, of_small = (parse_decoder_config({**shape, **limits, **sizes}) for sizes in (large, small))
    assert chunk_graphs(of_large, 8192) == (64, 128, 192, 256, 384, 512)
    assert chunk_graphs(of_small, 8192)[-1] == 2048
    assert chunk_graphs(of_small, 300) == (64, 128, 192, 256)
