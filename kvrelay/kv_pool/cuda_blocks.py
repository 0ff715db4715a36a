"""Blocks in the memory of an NVIDIA GPU, reached by processes of one host through CUDA's IPC handles."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrelay.errors import DeviceError
from kvrelay.kv_pool.block_digest import Words
from kvrelay.kv_pool.copy_kernel import Place, move_blocks
from kvrelay.kv_pool.cuda_api import CudaApi, DeviceWords
from kvrelay.kv_pool.cuda_driver import CudaDriver
from kvrelay.protocol.ids import BlockId

BlockIds: TypeAlias = npt.NDArray[np.int32]


class _Work:
    """One launch of the kernel. Until the device is done it reads and writes the pinned memory that is kept here."""

    def __init__(self, api: CudaApi, done: Any, digests: Words, block_ids: BlockIds) -> None:
        self._api = api
        self._done = done
        self._digests = digests
        self._block_ids = block_ids

    @property
    def is_done(self) -> bool:
        with _device_errors(self._api):
            return bool(self._done.query())

    def wait(self) -> Words:
        """See BlockWork."""
        with _device_errors(self._api):
            self._done.synchronize()
        return self._digests


class CudaBlocks:
    """See DeviceBlocks. All work is done in one stream of its own."""

    def __init__(
        self,
        api: CudaApi,
        driver: CudaDriver,
        shape: tuple[int, int, int],
        address: int,
        memory: bytes,
        give_back: Callable[[int], None],
    ) -> None:
        self.memory = memory
        self._api = api
        self._driver = driver
        self._shape = shape
        self._address = address
        # an engine that fails while it is made closes nothing
        self._give_back = weakref.finalize(self, give_back, address)
        self._give_back.atexit = False  # the driver does that with the process
        self._stream = api.stream()
        self._works: deque[_Work] = deque()
        self._lock = threading.Lock()

    @classmethod
    def create(cls, shape: tuple[int, int, int], api: CudaApi) -> CudaBlocks:
        """Make zeroed blocks [planes, blocks, words]. Raises OSError if there is not enough memory, DeviceError."""
        driver = _driver(api)
        api.release_memory()
        address = driver.allocate(8 * math.prod(shape))
        blocks = cls(api, driver, shape, address, driver.export(address), driver.free)
        blocks._warm_up()
        return blocks

    @classmethod
    def open(cls, shape: tuple[int, int, int], memory: bytes, api: CudaApi) -> CudaBlocks:
        """Open another process's. Raises PeerLostError if they cannot be reached, DeviceError."""
        driver = _driver(api)
        blocks = cls(api, driver, shape, driver.open(memory), memory, driver.close)
        blocks._warm_up()
        return blocks

    def tensor(self) -> Any:
        """Return the blocks as a tensor int64 [planes, blocks, words], good until they are closed."""
        tensor = self._api.tensor(DeviceWords(self._address, math.prod(self._shape)))
        if tensor.data_ptr() != self._address:
            raise DeviceError("the KV pool is not on the current CUDA device")
        return tensor.view(self._shape)

    def begin_copy(self, source: Any, planes: range, target_ids: list[BlockId], source_ids: list[BlockId]) -> _Work:
        with self._in_stream():
            ids = self._pinned_ids([source_ids, target_ids])
            return self._move(source._place(planes, ids[0]), self._place(planes, ids[1]), planes, ids)

    def begin_digest(self, planes: range, block_ids: list[BlockId], after: Any = None) -> _Work:
        with self._in_stream():
            if after is not None:
                self._stream.wait_event(after)
            ids = self._pinned_ids([block_ids])
            return self._move(self._place(planes, ids[0]), None, planes, ids)

    def read(self, planes: range, block_ids: list[BlockId]) -> Words:
        with self._in_stream():
            staging, ids = self._staging(planes, block_ids)
            work = self._move(self._place(planes, ids[0]), _staged(staging, ids[1]), planes, ids)
        work.wait()
        return staging

    def write(self, planes: range, block_ids: list[BlockId], words: Words) -> Words:
        with self._in_stream():
            staging, ids = self._staging(planes, block_ids)
            staging[:] = words
            work = self._move(_staged(staging, ids[1]), self._place(planes, ids[0]), planes, ids)
        return work.wait()

    def close(self) -> None:
        with contextlib.suppress(DeviceError):  # a broken device: the driver gives the memory back with the process
            with _device_errors(self._api):
                self._stream.synchronize()
            self._give_back()

    def _staging(self, planes: range, block_ids: list[BlockId]) -> tuple[Words, BlockIds]:
        """Return pinned memory for blocks, and ids: theirs in the pool and in that memory."""
        count = len(block_ids)
        staging = self._api.pinned((len(planes), count, self._shape[2]), np.int64)
        return staging, self._pinned_ids([block_ids, list(range(count))])

    def _pinned_ids(self, block_ids: Sequence[Sequence[int]]) -> BlockIds:
        """Return lists of equal length as int32 [lists, blocks] that the device reads where it is."""
        ids = self._api.pinned((len(block_ids), len(block_ids[0])), np.int32)
        ids[:] = np.array(block_ids, np.int32)
        return ids

    def _place(self, planes: range, ids: BlockIds) -> Place:
        return Place(self._address, self._shape[1], planes.start, ids.ctypes.data)

    def _move(self, source: Place, target: Place | None, planes: range, ids: BlockIds) -> _Work:
        count = ids.shape[1]
        digests = self._api.pinned((len(planes), count), np.int64)
        done = self._api.event()
        move_blocks(source, target, digests.ctypes.data, len(planes), count, self._shape[2])
        done.record(self._stream)
        work = _Work(self._api, done, digests, ids)
        self._keep(work)
        return work

    def _keep(self, work: _Work) -> None:
        """Keep ``work``, and with it its pinned memory, until it is done: whoever began it may lose interest."""
        with self._lock:
            while self._works and self._works[0].is_done:
                self._works.popleft()
            self._works.append(work)

    def _warm_up(self) -> None:
        """Have the kernel compiled for blocks of this size, on memory that nobody uses."""
        with self._in_stream():
            staging, ids = self._staging(range(1), [BlockId(0)])
            place = _staged(staging, ids[0])
            works = [self._move(place, target, range(1), ids) for target in (place, None)]
        for work in works:
            work.wait()

    @contextlib.contextmanager
    def _in_stream(self) -> Iterator[None]:
        with _device_errors(self._api), self._api.on(self._stream):
            yield


def _driver(api: CudaApi) -> CudaDriver:
    with _device_errors(api):
        api.start()
    return CudaDriver()


def _staged(staging: Words, ids: BlockIds) -> Place:
    return Place(staging.ctypes.data, staging.shape[1], 0, ids.ctypes.data)


@contextlib.contextmanager
def _device_errors(api: CudaApi) -> Iterator[None]:
    """Name whatever the framework, Triton or CUDA raise a DeviceError."""
    try:
        yield
    except api.errors as error:
        raise DeviceError(f"CUDA: {error}") from error
