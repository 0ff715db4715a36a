"""Cutting chunks of prompts into tiles for attention, and choosing those whose context is gathered first.

Attention reads a context that lies in one piece faster than one in scattered blocks. Gathering costs one pass over the
context in each layer, which pays for itself in chunks of many tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


class Chunk(NamedTuple):
    """Consecutive rows of one sequence in a step: ``num_rows`` from ``first_row`` on, the first at ``position``."""

    first_row: int
    num_rows: int
    position: int
    table_row: int

    @property
    def end(self) -> int:
        """Tokens of the context after the step."""
        return self.position + self.num_rows


class DenseRoom(NamedTuple):
    """Room for gathered contexts: ``capacity`` tokens, a multiple of ``piece``, for chunks of ``fewest`` tokens on.

    A context begins at a multiple of ``piece`` tokens, and a tile has as many queries at most.
    """

    capacity: int
    fewest: int
    piece: int


class Tiles(NamedTuple):
    """``paged`` [4, T]: first row, number of rows, position of the first, row in the block tables.

    ``dense`` [4, U]: the same with the token of the room where the context begins in place of the last.
    ``pieces`` [3, P]: what each piece of the room is to hold: row in the block tables, position of its first token, end
    of the context.
    """

    paged: Int32
    dense: Int32
    pieces: Int32


class TileCutter:
    """Cuts chunks into tiles of at most ``rows`` queries, or gathers their contexts where there is ``room``."""

    def __init__(self, rows: int, room: DenseRoom | None) -> None:
        self._rows = rows
        self._room = room

    def most(self, num_tokens: int, num_chunks: int) -> tuple[int, int, int]:
        """Return how many paged tiles, dense tiles and pieces a step of so many tokens and chunks has at most."""
        paged = num_tokens // self._rows + num_chunks
        if self._room is None:
            return paged, 0, 0
        gathered = num_tokens // self._room.fewest
        return paged, num_tokens // self._room.piece + gathered, self._room.capacity // self._room.piece

    def cut(self, chunks: list[Chunk]) -> Tiles:
        """Return the tiles of ``chunks``, those with the longest context first."""
        paged: list[Chunk] = []
        dense: list[Chunk] = []
        pieces: list[tuple[int, int, int]] = []
        for chunk in chunks:
            added = self._pieces(chunk, len(pieces))
            if added:
                begin = len(pieces) * self._piece
                dense += (tile._replace(table_row=begin) for tile in _tiles(chunk, self._piece))
                pieces += added
            else:
                paged += _tiles(chunk, self._rows)
        return Tiles(_sorted(paged), _sorted(dense), np.array(pieces, np.int32).reshape(-1, 3).T)

    @property
    def _piece(self) -> int:
        return 0 if self._room is None else self._room.piece

    def _pieces(self, chunk: Chunk, used: int) -> list[tuple[int, int, int]]:
        """Return the pieces of the context of ``chunk``; none if gathering does not pay or there is no room."""
        room = self._room
        if (
            room is None
            or chunk.num_rows < room.fewest
            or used + -(-chunk.end // room.piece) > room.capacity // room.piece
        ):
            return []
        return [(chunk.table_row, first, chunk.end) for first in range(0, chunk.end, room.piece)]


def _tiles(chunk: Chunk, rows: int) -> list[Chunk]:
    return [
        Chunk(chunk.first_row + begin, min(rows, chunk.num_rows - begin), chunk.position + begin, chunk.table_row)
        for begin in range(0, chunk.num_rows, rows)
    ]


def _sorted(tiles: list[Chunk]) -> Int32:
    return np.array(sorted(tiles, key=lambda tile: -tile.position), np.int32).reshape(-1, 4).T
