"""How the bytes of a frame get from one pool to another: as payload over ZMQ, or by reading the sender's shared memory.

A link has two ends. The sender's ``read`` says what travels with a frame; the receiver's ``write`` puts the blocks
where they belong and says whether they are the ones that were read. Another kind of link (RDMA through a library, say)
is another class with these two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from kvrelay.core.ids import BlockId
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.messages.messager_to_messager import KVFrame

Bytes: TypeAlias = npt.NDArray[np.uint8]

UNCHECKED = 0
"""Digest of a frame that is not verified."""

_MIN_RUN_BYTES = 64 << 10


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
    """The blocks travel as payload: all K and then all V."""

    def __init__(self, pool: KVMemory, *, checksum: bool) -> None:
        self._pool = pool
        self._checksum = checksum

    def read(self, frame: KVFrame, source_block_ids: list[BlockId]) -> Outgoing:
        """Return views of the blocks, or copies where views would be many and small."""
        parts = _read(self._pool, frame.layer, source_block_ids)
        return Outgoing(_digest(parts) if self._checksum else UNCHECKED, parts)

    def write(self, frame: KVFrame, payload: Sequence[memoryview]) -> bool:
        """Verify the payload before a byte of it is written."""
        if frame.digest != UNCHECKED and _digest(payload) != frame.digest:
            return False
        block_bytes, blocks = self._pool.geometry.plane_block_bytes, np.asarray(frame.target_block_ids)
        if any(part.nbytes % block_bytes for part in payload):
            payload = [memoryview(b"".join(payload))]
        rows = [np.frombuffer(part, np.uint8).reshape(-1, block_bytes) for part in payload]
        done = 0
        for part in rows:
            for kv, first, count in _planes_of(done, len(part), len(blocks)):
                offset = kv * len(blocks) + first - done
                plane = self._pool.planes[frame.layer, kv]
                _assign(plane, blocks[first : first + count], part[offset : offset + count])
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
        return Outgoing(_digest(_read(self._pool, frame.layer, source_block_ids)), [])

    def write(self, frame: KVFrame, payload: Sequence[memoryview]) -> bool:
        """Copy the blocks and verify the copy; without a mapped source there is nothing to copy."""
        if self._source is None or payload:
            return False
        targets, sources = np.asarray(frame.target_block_ids), np.asarray(frame.source_block_ids)
        for kv in (0, 1):
            _copy(self._pool.planes[frame.layer, kv], targets, self._source.planes[frame.layer, kv], sources)
        return _digest(_read(self._pool, frame.layer, frame.target_block_ids)) == frame.digest


def _digest(parts: Sequence[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _runs(*block_ids: npt.NDArray[np.int64]) -> list[slice]:
    """Return the places where all of ``block_ids`` go up by one from place to place, as slices in order."""
    jumps = np.zeros(len(block_ids[0]) - 1, np.bool_)
    for ids in block_ids:
        jumps |= np.diff(ids) != 1
    edges = [0, *(np.flatnonzero(jumps) + 1).tolist(), len(block_ids[0])]
    return [slice(start, end) for start, end in pairwise(edges)]


def _is_fragmented(runs: list[slice], num_blocks: int, block_bytes: int) -> bool:
    """Tell whether one indexed copy beats a copy for each run."""
    return len(runs) > 1 and num_blocks * block_bytes < len(runs) * _MIN_RUN_BYTES


def _read(pool: KVMemory, layer: int, block_ids: list[BlockId]) -> list[memoryview]:
    """Return the blocks' bytes in one layer, all K and then all V, with as few copies and parts as sensible."""
    blocks = np.asarray(block_ids)
    runs = _runs(blocks)
    if _is_fragmented(runs, len(blocks), pool.geometry.plane_block_bytes):
        return [pool.planes[layer, kv].take(blocks, axis=0).reshape(-1).data for kv in (0, 1)]
    spans = [(block_ids[run.start], block_ids[run.stop - 1] + 1) for run in runs]
    return [pool.planes[layer, kv, first:end].reshape(-1).data for kv in (0, 1) for first, end in spans]


def _assign(plane: Bytes, blocks: npt.NDArray[np.int64], rows: Bytes) -> None:
    """Put ``rows[i]`` into block ``blocks[i]`` of ``plane``."""
    runs = _runs(blocks)
    if _is_fragmented(runs, len(blocks), plane.shape[1]):
        plane[blocks] = rows
        return
    for run in runs:
        np.copyto(plane[blocks[run.start] : blocks[run.stop - 1] + 1], rows[run])


def _copy(target: Bytes, targets: npt.NDArray[np.int64], source: Bytes, sources: npt.NDArray[np.int64]) -> None:
    """Copy block ``sources[i]`` of ``source`` into block ``targets[i]`` of ``target``."""
    runs = _runs(targets, sources)
    if _is_fragmented(runs, len(targets), target.shape[1]):
        target[targets] = source[sources]
        return
    for run in runs:
        last = run.stop - 1
        rows = source[sources[run.start] : sources[last] + 1]
        np.copyto(target[targets[run.start] : targets[last] + 1], rows)


def _planes_of(start: int, count: int, num_blocks: int) -> list[tuple[int, int, int]]:
    """Return rows ``start``.. of a payload as (0 for K or 1 for V, first block, count): at most one entry for each."""
    spans = [(kv, max(start, kv * num_blocks), min(start + count, (kv + 1) * num_blocks)) for kv in (0, 1)]
    return [(kv, first - kv * num_blocks, end - first) for kv, first, end in spans if first < end]
