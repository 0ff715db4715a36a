"""Cost of the KV store relative to its medium: put and get of each backend against raw I/O of the same bytes.

Both alternate within one run, and the best round of each counts, so that other load affects both. Blocks are in a pool
with the layout of a node (planes by layer). Raw I/O of files is measured twice: on contiguous bytes, the speed of the
medium, and from and to the planes of the pool, which is the reference for the aim. The last columns are the longest
turn of the event loop during a call of the store: CPU time of its thread, and wall time, which on a busy machine is
mostly other load.

Usage: python benchmarks/storage.py [--block-kib 192 1024] [--backends memory file redis mooncake]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop
from pydantic import SecretStr
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from kvrelay.config.storage import StorageConfig
from kvrelay.machine.clock import Clock
from kvrelay.protocol.geometry import KVGeometry
from kvstore.storage.factory import make_store
from kvstore.storage.interface import KVStore, PutOutcome

sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "storage")]
from mooncake_master import join, mooncake_master, why_no_mooncake
from support.redis_server import binary, redis_server

NUM_LAYERS = 24
BATCH_BYTES = 32 << 20
ROUNDS = 15
PIPELINE_BYTES = 4 << 20
CAPACITY_BYTES = 1 << 30
AIMS = {"memory": None, "file": 0.7, "redis": 0.8, "mooncake": 0.8}

Bytes = npt.NDArray[np.uint8]
Operation = Callable[[], Awaitable[object]]


@dataclass
class Data:
    """A batch of blocks: a pool to write from, one to read into, and the same bytes as one run each."""

    geometry: KVGeometry
    pool: Bytes
    into: Bytes
    flat: Bytes
    flat_into: Bytes
    hashes: list[bytes]

    @classmethod
    def of(cls, block_bytes: int) -> Data:
        plane = block_bytes // (2 * NUM_LAYERS)
        geometry = KVGeometry(NUM_LAYERS, 1, plane, 1, "uint8", "benchmark")
        num_blocks = BATCH_BYTES // geometry.block_bytes
        rng = np.random.default_rng(0)
        pool = rng.integers(0, 256, (NUM_LAYERS, 2, num_blocks, plane), np.uint8)
        flat = np.moveaxis(pool, 2, 0).reshape(num_blocks, -1).copy()
        hashes = [rng.bytes(32) for _ in range(num_blocks)]
        return cls(geometry, pool, np.zeros_like(pool), flat, np.zeros_like(flat), hashes)

    @property
    def num_blocks(self) -> int:
        return len(self.hashes)

    @property
    def size_bytes(self) -> int:
        return self.flat.nbytes

    def views(self, pool: Bytes) -> list[Bytes]:
        return [pool[:, :, index] for index in range(self.num_blocks)]

    def planes(self, pool: Bytes, index: int) -> list[memoryview]:
        return [pool[layer, kv, index].data for layer in range(NUM_LAYERS) for kv in (0, 1)]


@dataclass
class Times:
    """Shortest time of each thing measured, and how long the loop was held up by the store."""

    best_s: dict[str, float] = field(default_factory=dict)
    longest_work_s: float = 0.0
    longest_pause_s: float = 0.0

    async def take(self, name: str, operation: Operation) -> None:
        start = time.perf_counter()
        await operation()
        self.best_s[name] = min(self.best_s.get(name, float("inf")), time.perf_counter() - start)


class Pauses:
    """Ticks on the loop and keeps the longest time between two ticks, CPU time of the thread and time on the clock."""

    def __init__(self) -> None:
        self.work_s = self.pause_s = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        task = asyncio.ensure_future(self._tick())
        try:
            yield
        finally:
            task.cancel()

    async def _tick(self) -> None:
        work, clock = time.thread_time(), time.perf_counter()
        while True:
            await asyncio.sleep(0)
            work_now, clock_now = time.thread_time(), time.perf_counter()
            self.work_s, self.pause_s = max(self.work_s, work_now - work), max(self.pause_s, clock_now - clock)
            work, clock = work_now, clock_now


async def measure(store: KVStore, data: Data, raw: dict[str, Operation]) -> Times:
    """Run the store's put and get and the ``raw`` operations in turns."""
    times, pauses = Times(), Pauses()

    async def put() -> None:
        outcomes = await store.put(data.hashes, data.views(data.pool))
        assert outcomes == [PutOutcome.WRITTEN] * data.num_blocks, outcomes

    async def get() -> None:
        assert all(await store.get(data.hashes, data.views(data.into)))

    for number in range(ROUNDS):
        for name, operation in raw.items():
            await times.take(name, operation)
        await store.clear()
        await times.take("put", put)
        await times.take("get", get)
        if not number:
            assert (data.pool == data.into).all()
    await store.clear()
    with pauses.watched():  # in a round of its own: the ticks cost time
        await put()
        await get()
    times.longest_work_s, times.longest_pause_s = pauses.work_s, pauses.pause_s
    return times


# ---------------------------------------------------------------- backends and their raw media


@contextlib.asynccontextmanager
async def memory(data: Data) -> AsyncIterator[tuple[KVStore, dict[str, Operation]]]:
    async def copy_in() -> None:
        for index, block in enumerate(data.views(data.pool)):
            data.flat_into[index].reshape(block.shape)[...] = block

    async def copy_out() -> None:
        for index, block in enumerate(data.views(data.into)):
            block[...] = data.flat[index].reshape(block.shape)

    async with opened(StorageConfig(backend="memory", capacity=CAPACITY_BYTES, timeout_s=60), data) as store:
        yield store, {"raw put": copy_in, "raw get": copy_out}


@contextlib.asynccontextmanager
async def file(data: Data) -> AsyncIterator[tuple[KVStore, dict[str, Operation]]]:
    size = data.flat[0].nbytes
    with tempfile.TemporaryDirectory(prefix="kv-benchmark-") as path, (Path(path) / "raw").open("w+b") as raw:
        fd = raw.fileno()
        os.posix_fallocate(fd, 0, data.size_bytes)

        async def write() -> None:
            for index in range(data.num_blocks):
                os.pwrite(fd, data.flat[index].data, index * size)

        async def read() -> None:
            for index in range(data.num_blocks):
                os.preadv(fd, [data.flat_into[index].data], index * size)

        async def write_planes() -> None:
            for index in range(data.num_blocks):
                os.pwritev(fd, data.planes(data.pool, index), index * size)

        async def read_planes() -> None:
            for index in range(data.num_blocks):
                os.preadv(fd, data.planes(data.into, index), index * size)

        operations: dict[str, Operation] = {"raw put": write, "raw get": read}
        operations |= {"planes put": write_planes, "planes get": read_planes}
        config = StorageConfig(backend="file", path=f"{path}/kv", capacity=CAPACITY_BYTES, timeout_s=60)
        async with opened(config, data) as store:
            yield store, operations


@contextlib.asynccontextmanager
async def redis(data: Data) -> AsyncIterator[tuple[KVStore, dict[str, Operation]]]:
    per_pipeline = max(1, PIPELINE_BYTES // data.flat[0].nbytes)
    with redis_server() as server:
        client = Redis.from_url(server.url, protocol=3)

        async def pipelines(command: Callable[[int], tuple[Any, ...]]) -> None:
            for start in range(0, data.num_blocks, per_pipeline):
                pipeline = client.pipeline(transaction=False)
                for index in range(start, min(start + per_pipeline, data.num_blocks)):
                    pipeline.execute_command(*command(index))
                await pipeline.execute()

        async def put() -> None:
            await client.flushall()
            await pipelines(lambda index: ("SET", f"raw{index}", data.flat[index].data))

        async def get() -> None:
            await pipelines(lambda index: ("GET", f"raw{index}"))

        async with opened(StorageConfig(backend="redis", url=SecretStr(server.url), timeout_s=60), data) as store:
            yield store, {"raw put": put, "raw get": get}
        await client.aclose()


@contextlib.asynccontextmanager
async def mooncake(data: Data) -> AsyncIterator[tuple[KVStore, dict[str, Operation]]]:
    size, keys = data.flat[0].nbytes, [f"raw{index}" for index in range(data.num_blocks)]
    with mooncake_master() as master:
        client = join(master)
        for flat in (data.flat, data.flat_into):
            client.register_buffer(flat.ctypes.data, flat.nbytes)

        def places(flat: Bytes) -> tuple[list[int], list[int]]:
            return [flat.ctypes.data + index * size for index in range(data.num_blocks)], [size] * data.num_blocks

        async def put() -> None:
            client.remove_all(force=True)
            assert not any(client.batch_put_from(keys, *places(data.flat)))

        async def get() -> None:
            assert min(client.batch_get_into(keys, *places(data.flat_into))) == size

        config = StorageConfig(backend="mooncake", master=master.address, capacity=CAPACITY_BYTES, timeout_s=60)
        async with opened(config, data) as store:
            yield store, {"raw put": put, "raw get": get}
        client.close()


@contextlib.asynccontextmanager
async def opened(config: StorageConfig, data: Data) -> AsyncIterator[KVStore]:
    store = make_store(config, data.geometry, Clock())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


BACKENDS = {"memory": memory, "file": file, "redis": redis, "mooncake": mooncake}


def why_not(backend: str) -> str | None:
    if backend == "redis" and binary() is None:
        return "no redis-server here"
    return why_no_mooncake() if backend == "mooncake" else None


# ---------------------------------------------------------------- tables


def row(backend: str, kind: str, data: Data, times: Times) -> list[str]:
    def speed(name: str) -> str:
        return f"{data.size_bytes / times.best_s[name] / 1e9:.2f}" if name in times.best_s else ""

    def ratio(name: str) -> float:
        return times.best_s.get(name, 0.0) / times.best_s[kind]

    against_raw, against_planes, aim = ratio(f"raw {kind}"), ratio(f"planes {kind}"), AIMS[backend]
    measured = against_planes or against_raw
    verdict = "" if aim is None else f"[green]>= {aim:.0%}[/]" if measured >= aim else f"[red]< {aim:.0%}[/]"
    return [
        backend,
        kind,
        f"{data.geometry.block_bytes >> 10}",
        speed(kind),
        speed(f"raw {kind}"),
        f"{against_raw:.0%}",
        speed(f"planes {kind}"),
        f"{against_planes:.0%}" if against_planes else "",
        verdict,
        f"{1e3 * times.longest_work_s:.2f}",
        f"{1e3 * times.longest_pause_s:.2f}",
    ]


async def run(console: Console, block_kib: list[int], backends: list[str]) -> None:
    table = Table("backend", "call", title=f"{BATCH_BYTES >> 20} MiB a call, GB/s, best of {ROUNDS}")
    for heading in ("block KiB", "store", "raw", "of raw", "raw, planes", "of that", "aim", "turn ms", "on the clock"):
        table.add_column(heading, justify="right")
    for backend in backends:
        if reason := why_not(backend):
            console.print(f"{backend}: {reason}")
            continue
        for kib in block_kib:
            data = Data.of(kib << 10)
            async with BACKENDS[backend](data) as (store, raw):
                times = await measure(store, data, raw)
            for kind in ("put", "get"):
                table.add_row(*row(backend, kind, data, times))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block-kib", type=int, nargs="+", default=[192, 1152])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(Console(width=140), arguments.block_kib, arguments.backends))


if __name__ == "__main__":
    main()
