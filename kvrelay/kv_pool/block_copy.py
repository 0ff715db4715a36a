"""Copies KV blocks within host memory, with few and large copies.

A plane is ``[num_blocks, plane_block_bytes]`` of uint8: the K or the V of all blocks in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.protocol.ids import BlockId

Bytes: TypeAlias = npt.NDArray[np.uint8]
Blocks: TypeAlias = npt.NDArray[np.void]

_MIN_RUN_BYTES = 64 << 10
_PIECE_BYTES = 256 << 10
"""Bytes copied before they are digested, so that they are still in the core's cache."""


def read(planes: Sequence[Bytes], block_ids: list[BlockId]) -> list[memoryview]:
    """Return the blocks' bytes plane by plane, in few parts. Parts may be views."""
    runs = _runs(block_ids)
    if _is_fragmented(runs, len(block_ids), planes[0].shape[1]):
        places = np.asarray(block_ids)
        return [_as_blocks(plane).take(places).view(np.uint8).data for plane in planes]
    spans = [(block_ids[run.start], block_ids[run.stop - 1] + 1) for run in runs]
    return [plane[first:end].reshape(-1).data for plane in planes for first, end in spans]


def pieces(planes: Sequence[Bytes], block_ids: list[BlockId]) -> Iterator[memoryview]:
    """Yield the bytes that ``read`` returns, with copies of at most one piece at a time."""
    block_bytes = planes[0].shape[1]
    if not _is_fragmented(_runs(block_ids), len(block_ids), block_bytes):
        yield from read(planes, block_ids)
        return
    places, per_piece = np.asarray(block_ids), _per_piece(block_bytes)
    for plane in planes:
        blocks = _as_blocks(plane)
        for first in range(0, len(places), per_piece):
            yield blocks.take(places[first : first + per_piece]).view(np.uint8).data


def write(planes: Sequence[Bytes], block_ids: list[BlockId], payload: Sequence[memoryview]) -> None:
    """Write ``payload``, the blocks' bytes plane by plane, split at any positions, to the blocks."""
    block_bytes = planes[0].shape[1]
    if any(part.nbytes % block_bytes for part in payload):
        payload = [memoryview(b"".join(payload))]
    done = 0
    for part in payload:
        rows = np.frombuffer(part, np.uint8).reshape(-1, block_bytes)
        for plane, first, count in _planes_of(done, len(rows), len(block_ids)):
            offset = plane * len(block_ids) + first - done
            _assign(planes[plane], block_ids[first : first + count], rows[offset : offset + count])
        done += len(rows)


def copy(
    targets: Sequence[Bytes], target_ids: list[BlockId], sources: Sequence[Bytes], source_ids: list[BlockId]
) -> Iterator[memoryview]:
    """Copy block ``source_ids[i]`` of each plane of ``sources`` to ``target_ids[i]``; yield each piece copied."""
    runs = _runs(target_ids, source_ids)
    copies = _gather if _is_fragmented(runs, len(target_ids), targets[0].shape[1]) else _copy_runs
    for target, source in zip(targets, sources, strict=True):
        yield from copies(target, target_ids, source, source_ids, runs)


def _runs(*block_ids: list[BlockId]) -> list[slice]:
    """Return slices in which all of ``block_ids`` are consecutive, in order."""
    count = len(block_ids[0])
    if all(ids[-1] - ids[0] == count - 1 and ids == list(range(ids[0], ids[0] + count)) for ids in block_ids):
        return [slice(0, count)]
    jumps = np.zeros(count - 1, np.bool_)
    for ids in block_ids:
        jumps |= np.diff(ids) != 1
    edges = [0, *(np.flatnonzero(jumps) + 1).tolist(), count]
    return [slice(start, end) for start, end in pairwise(edges)]


def _is_fragmented(runs: list[slice], num_blocks: int, block_bytes: int) -> bool:
    """Return whether one indexed copy is faster than a copy per run."""
    return len(runs) > 1 and num_blocks * block_bytes < len(runs) * _MIN_RUN_BYTES


def _per_piece(block_bytes: int) -> int:
    return max(1, _PIECE_BYTES // block_bytes)


def _as_blocks(rows: Bytes) -> Blocks:
    """Return ``rows`` with one opaque item per row, which numpy copies at memory speed when scattered."""
    return rows.view(f"V{rows.shape[1]}").reshape(-1)


def _assign(plane: Bytes, block_ids: list[BlockId], rows: Bytes) -> None:
    """Write ``rows[i]`` to block ``block_ids[i]`` of ``plane``."""
    runs = _runs(block_ids)
    if _is_fragmented(runs, len(block_ids), plane.shape[1]):
        _as_blocks(plane)[np.asarray(block_ids)] = _as_blocks(rows)
        return
    for run in runs:
        np.copyto(plane[block_ids[run.start] : block_ids[run.stop - 1] + 1], rows[run])


def _copy_runs(
    target: Bytes, targets: list[BlockId], source: Bytes, sources: list[BlockId], runs: list[slice]
) -> Iterator[memoryview]:
    """Copy block ``sources[i]`` of ``source`` into block ``targets[i]`` of ``target``, and yield each piece copied."""
    per_piece = _per_piece(target.shape[1])
    for run in runs:
        for place in range(run.start, run.stop, per_piece):
            count = min(per_piece, run.stop - place)
            piece = target[targets[place] : targets[place] + count]
            np.copyto(piece, source[sources[place] : sources[place] + count])
            yield piece.reshape(-1).data


def _gather(
    target: Bytes, targets: list[BlockId], source: Bytes, sources: list[BlockId], _: list[slice]
) -> Iterator[memoryview]:
    """Like ``_copy_runs`` for scattered blocks: each piece is gathered, yielded and scattered."""
    per_piece = _per_piece(target.shape[1])
    into, out_of = _as_blocks(target), _as_blocks(source)
    to, of = np.asarray(targets), np.asarray(sources)
    for first in range(0, len(of), per_piece):
        piece = out_of.take(of[first : first + per_piece])
        yield piece.view(np.uint8).data
        into[to[first : first + per_piece]] = piece


def _planes_of(start: int, count: int, num_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows ``start``.. of a payload as (plane of the frame, first block, count), at most one for each plane."""
    end = start + count
    while start < end:
        plane, first = divmod(start, num_blocks)
        count = min(num_blocks - first, end - start)
        yield plane, first, count
        start += count
