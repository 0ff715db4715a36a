"""How the bytes of a frame get from one pool to another: as payload over ZMQ, or by reading the sender's shared memory.

A link has two ends. The sender's ``read`` says what travels with a frame; the receiver's ``write`` puts the blocks
where they belong and says whether they are the ones that were read. Another kind of link (RDMA through a library, say)
is another class with these two methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.core.ids import BlockId
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.messages.messager_to_messager import KVFrame

Bytes: TypeAlias = npt.NDArray[np.uint8]
Blocks: TypeAlias = npt.NDArray[np.void]

UNCHECKED = 0
"""Digest of a frame that is not verified."""

_MIN_RUN_BYTES = 64 << 10
_PIECE_BYTES = 256 << 10
"""How much is copied before it is looked at again: it is still in the core's own cache then."""


class Outgoing(NamedTuple):
    """What travels with a frame: its digest and raw parts."""

    digest: int
    parts: list[memoryview]


class Link(Protocol):
    """One way to move blocks."""

    def read(self, frame: KVFrame, source_block_ids: list[BlockId]) -> Outgoing:
        """Return what to send for these blocks of the sender's pool; the parts may be views of it."""

    def write(self, frame: KVFrame, payload: Sequence[memoryview]) -> bool:
        """Put the blocks into the receiver's pool, once. False: they are not what was read, and hold nothing of use."""


class PayloadLink:
    """The blocks travel as payload: layer by layer, all K and then all V."""

    def __init__(self, pool: KVMemory, *, checksum: bool) -> None:
        self._pool = pool
        self._checksum = checksum

    def read(self, frame: KVFrame, source_block_ids: list[BlockId]) -> Outgoing:
        """Return views of the blocks, or copies where views would be many and small."""
        parts = _read(self._pool, frame.layers, source_block_ids)
        return Outgoing(_digest(parts) if self._checksum else UNCHECKED, parts)

    def write(self, frame: KVFrame, payload: Sequence[memoryview]) -> bool:
        """Verify the payload before a byte of it is written."""
        if frame.digest != UNCHECKED and _digest(payload) != frame.digest:
            return False
        block_bytes, blocks = self._pool.geometry.plane_block_bytes, frame.target_block_ids
        if any(part.nbytes % block_bytes for part in payload):
            payload = [memoryview(b"".join(payload))]
        rows = [np.frombuffer(part, np.uint8).reshape(-1, block_bytes) for part in payload]
        done = 0
        for part in rows:
            for plane, first, count in _planes_of(done, len(part), len(blocks)):
                offset = plane * len(blocks) + first - done
                target = self._pool.planes[frame.layer + plane // 2, plane % 2]
                _assign(target, blocks[first : first + count], part[offset : offset + count])
            done += len(part)
        return True


class SharedMemoryLink:
    """Nothing travels but the frame: the receiver, on the same host, copies the blocks out of the sender's pool.

    The digest is always verified, and on the copy: a sender that has given up on the link may change its blocks while
    they are read, and nothing else would tell.
    """

    def __init__(self, pool: KVMemory, source: KVMemory | None = None) -> None:
        self._pool = pool
        self._source = source

    def read(self, frame: KVFrame, source_block_ids: list[BlockId]) -> Outgoing:
        """Return the digest of the blocks."""
        return Outgoing(_digest(_pieces(self._pool, frame.layers, source_block_ids)), [])

    def write(self, frame: KVFrame, payload: Sequence[memoryview]) -> bool:
        """Copy the blocks and verify the copy; without a mapped source there is nothing to copy."""
        if self._source is None or payload:
            return False
        targets, sources = frame.target_block_ids, frame.source_block_ids
        runs, digest = _runs(targets, sources), xxhash.xxh3_64()
        copy = _gather if _is_fragmented(runs, len(targets), self._pool.geometry.plane_block_bytes) else _copy_runs
        for layer in frame.layers:
            for target, source in zip(self._pool.planes[layer], self._source.planes[layer], strict=True):
                for copied in copy(target, targets, source, sources, runs):
                    digest.update(copied)
        return digest.intdigest() == frame.digest


def _digest(parts: Iterable[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _runs(*block_ids: list[BlockId]) -> list[slice]:
    """Return the places where all of ``block_ids`` go up by one from place to place, as slices in order."""
    count = len(block_ids[0])
    if all(ids[-1] - ids[0] == count - 1 and ids == list(range(ids[0], ids[0] + count)) for ids in block_ids):
        return [slice(0, count)]
    jumps = np.zeros(count - 1, np.bool_)
    for ids in block_ids:
        jumps |= np.diff(ids) != 1
    edges = [0, *(np.flatnonzero(jumps) + 1).tolist(), count]
    return [slice(start, end) for start, end in pairwise(edges)]


def _is_fragmented(runs: list[slice], num_blocks: int, block_bytes: int) -> bool:
    """Tell whether one indexed copy beats a copy for each run."""
    return len(runs) > 1 and num_blocks * block_bytes < len(runs) * _MIN_RUN_BYTES


def _per_piece(block_bytes: int) -> int:
    return max(1, _PIECE_BYTES // block_bytes)


def _as_blocks(rows: Bytes) -> Blocks:
    """Return ``rows`` with one opaque item a row: numpy copies scattered items of that kind as fast as memory goes."""
    return rows.view(f"V{rows.shape[1]}").reshape(-1)


def _read(pool: KVMemory, layers: range, block_ids: list[BlockId]) -> list[memoryview]:
    """Return the blocks' bytes layer by layer, all K and then all V, with as few copies and parts as sensible."""
    runs = _runs(block_ids)
    if _is_fragmented(runs, len(block_ids), pool.geometry.plane_block_bytes):
        places = np.asarray(block_ids)
        return [_as_blocks(plane).take(places).view(np.uint8).data for plane in _planes(pool, layers)]
    spans = [(block_ids[run.start], block_ids[run.stop - 1] + 1) for run in runs]
    return [plane[first:end].reshape(-1).data for plane in _planes(pool, layers) for first, end in spans]


def _pieces(pool: KVMemory, layers: range, block_ids: list[BlockId]) -> Iterator[memoryview]:
    """Yield the bytes that ``_read`` returns without having more than a piece of them in copies."""
    block_bytes = pool.geometry.plane_block_bytes
    if not _is_fragmented(_runs(block_ids), len(block_ids), block_bytes):
        yield from _read(pool, layers, block_ids)
        return
    places, per_piece = np.asarray(block_ids), _per_piece(block_bytes)
    for plane in _planes(pool, layers):
        blocks = _as_blocks(plane)
        for first in range(0, len(places), per_piece):
            yield blocks.take(places[first : first + per_piece]).view(np.uint8).data


def _planes(pool: KVMemory, layers: range) -> Iterator[Bytes]:
    """Yield K and V of each layer."""
    for layer in layers:
        yield from pool.planes[layer]


def _assign(plane: Bytes, block_ids: list[BlockId], rows: Bytes) -> None:
    """Put ``rows[i]`` into block ``block_ids[i]`` of ``plane``."""
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
    """Do as ``_copy_runs`` for blocks that lie anywhere: each piece is collected, yielded and then spread."""
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
