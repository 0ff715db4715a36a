"""Host memory in place of a device's: work is done when the call returns, but for a digest that waits for an event.

For benchmarks each piece of work may take some time more, in which it costs the host nothing: a device whose time is
shared among processes answers as late.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import msgspec
import numpy as np

from kvrelay.kv_pool.block_digest import Words, digest_blocks
from kvrelay.kv_pool.shared_file import create_file, map_file, open_file
from kvrelay.protocol.ids import BlockId


class _File(msgspec.Struct, frozen=True):
    pid: int
    fd: int
    tag: str
    latency_s: float = 0.0


class _Done:
    """Work that is done, or counts as done ``latency_s`` from now."""

    def __init__(self, digests: Words, latency_s: float) -> None:
        self._digests = digests
        self._done_at_s = time.monotonic() + latency_s if latency_s else 0.0

    @property
    def is_done(self) -> bool:
        return not self._done_at_s or time.monotonic() >= self._done_at_s

    def wait(self) -> Words:
        """See BlockWork."""
        if self._done_at_s:
            time.sleep(max(0.0, self._done_at_s - time.monotonic()))
        return self._digests


class _DigestLater:
    """A digest of blocks as they are after the event ``after``."""

    is_done = False

    def __init__(self, blocks: SimulatedBlocks, planes: range, block_ids: list[BlockId], after: Any) -> None:
        self._blocks, self._planes, self._block_ids, self._after = blocks, planes, block_ids, after

    def wait(self) -> Words:
        """See BlockWork."""
        self._after.synchronize()
        return digest_blocks(self._blocks.content(self._planes, self._block_ids))


class SimulatedBlocks:
    """See DeviceBlocks. ``words`` is the memory itself. ``latency_s``: how long each piece of work takes at least."""

    latency_s = 0.0

    def __init__(self, shape: tuple[int, int, int], file: _File, fd: int) -> None:
        self.memory = msgspec.json.encode(file)
        self.latency_s = file.latency_s
        self._fd = fd
        self._map = map_file(fd, 8 * int(np.prod(shape)))
        self.words: Words = np.frombuffer(self._map, np.int64, int(np.prod(shape))).reshape(shape)

    @classmethod
    def create(cls, shape: tuple[int, int, int]) -> SimulatedBlocks:
        """Make zeroed blocks [planes, blocks, words]. Raises OSError."""
        fd, tag = create_file("kvrelay-device", 8 * int(np.prod(shape)))
        return cls(shape, _File(os.getpid(), fd, tag, cls.latency_s), fd)

    @classmethod
    def open(cls, shape: tuple[int, int, int], memory: bytes) -> SimulatedBlocks:
        """Open another process's. Raises PeerLostError, GeometryMismatchError, or MsgspecError for bad ``memory``."""
        file = msgspec.json.decode(memory, type=_File)
        return cls(shape, file, open_file(file.pid, file.fd, file.tag, 8 * int(np.prod(shape))))

    def begin_copy(self, source: Any, planes: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> _Done:
        words = source.content(planes, source_ids)
        return self._begin_write(planes, target_ids, words)

    def begin_digest(self, planes: range, block_ids: list[BlockId], after: Any = None) -> _Done | _DigestLater:
        if after is None:
            return _Done(digest_blocks(self.content(planes, block_ids)), self.latency_s)
        return _DigestLater(self, planes, block_ids, after)

    def read(self, planes: range, block_ids: list[BlockId]) -> Words:
        words = self.content(planes, block_ids)
        _Done(words, self.latency_s).wait()
        return words

    def content(self, planes: range, block_ids: list[BlockId]) -> Words:
        """Return a copy of blocks, at once."""
        words: Words = self.words[planes.start : planes.stop].take(block_ids, 1)
        return words

    def write(self, planes: range, block_ids: list[BlockId], words: Words) -> Words:
        return self._begin_write(planes, block_ids, words).wait()

    def _begin_write(self, planes: range, block_ids: list[BlockId], words: Words) -> _Done:
        self.words[planes.start : planes.stop, block_ids] = words
        return _Done(digest_blocks(words), self.latency_s)

    def close(self) -> None:
        del self.words
        with contextlib.suppress(BufferError):  # a view is still alive: the mapping goes with it
            self._map.close()
        os.close(self._fd)
