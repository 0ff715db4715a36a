"""Threads for a backend's blocking calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class BlockingThreads:
    """One thread for reads of ``get`` and one for the rest, so that a resume does not queue behind a preemption."""

    def __init__(self, name: str) -> None:
        self._reader = _Worker(f"{name}-read")
        self._writer = _Worker(f"{name}-write")

    async def read(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the reading thread, in order of submission."""
        return await self._reader.run(work)

    async def write(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the other thread, in order of submission."""
        return await self._writer.run(work)

    async def close(self, timeout_s: float) -> bool:
        """End the threads when their work is done; False if one hangs for more than ``timeout_s`` and is abandoned."""
        ends = [asyncio.ensure_future(worker.end()) for worker in (self._reader, self._writer)]
        _, hanging = await asyncio.wait(ends, timeout=timeout_s)
        for end in hanging:
            end.cancel()
        return not hanging


class _Worker:
    """A daemon thread that processes a queue. The process can exit even if a disk or a peer never answers."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._ended: Future[None] = Future()

    async def run(self, work: Callable[[], T]) -> T:
        if not self._thread.ident:
            self._thread.start()
        future: Future[T] = Future()
        self._queue.put((work, future))
        return await asyncio.wrap_future(future)

    async def end(self) -> None:
        self._queue.put(None)
        if self._thread.ident:
            await asyncio.wrap_future(self._ended)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            if not future.set_running_or_notify_cancel():
                continue  # its caller was cancelled
            try:
                result = work()
            except BaseException as error:  # passed on to the caller
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, work, future  # so that an idle thread keeps no call's memory alive
        self._ended.set_result(None)
