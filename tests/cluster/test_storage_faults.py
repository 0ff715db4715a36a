"""The KV store and those who write to it break under load. No token may be wrong, and nobody may wait for ever."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
import redis
from support.asking import Ask, Asker, assert_right, play, random_prompt
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p
from support.loops import run
from support.redis_server import RedisServer, binary, redis_server

from kvrelay.engine.fake import fake_geometry
from kvrelay.machine.clock import Clock
from kvstore.storage.factory import make_store
from kvstore.storage.file_layout import ENTRY_BYTES, SETS_OFFSET
from kvstore.storage.interface import VerifyReport

POOL = 48
"""Blocks of each decode node: room for three requests of this module, so that D preempts and writes all the time."""

AT_ONCE = 14
NUM_DEATHS = 20
DEATHS_A_ROUND = 5
"""While the load waits for its last answers nobody is killed."""

WRITE_S = 0.001
"""A write is seldom over sooner."""

DECODE_NODES = ("d0", "d1", "d2")
REDIS_GONE_S = 10.0
REDIS_STOPPED_S = 2.0
MiB = 1 << 20

Reservation: TypeAlias = tuple[int, int]
"""A slot of a file store, and which filling of it."""


def asks_for(seed: int) -> Iterator[Ask]:
    """Yield requests for ever: prompts that come again, of which a prefill node keeps a few, with outputs that vary."""
    rng = random.Random(seed)
    prompts = [random_prompt(rng, rng.randint(40, 240)) for _ in range(24)]
    for number in itertools.count():
        yield Ask(rng.choice(prompts), rng.randint(20, 120), 0.9 if number % 2 else 0.0, number)


def under_load(cluster: Cluster, seed: int, act: Callable[[], object]) -> int:
    """Keep ``cluster`` busy until ``act`` has taken its course; check every answer and return how many there were."""
    asks = asks_for(seed)

    async def scenario(asker: Asker) -> int:
        acting = asyncio.ensure_future(asyncio.to_thread(act))

        async def keep_asking() -> int:
            num_right = 0
            while not (num_right and acting.done()):
                ask = next(asks)
                num_right += assert_right(cluster, [ask], [await asker.ask(ask)])
            return num_right

        answered: list[Any] = await asyncio.gather(acting, *(keep_asking() for _ in range(AT_ONCE)))
        return sum(map(int, answered[1:]))

    num_right = play(cluster, scenario)
    cluster.wait_until_quiescent()
    return num_right


def counted(cluster: Cluster, name: str) -> float:
    return float(sum(load["counters"].get(name, 0) for load in cluster.loads().values()))


def storing_cluster(model: Path, storage: dict[str, object]) -> dict[str, object]:
    """Return 1P3D that admits whatever fits now, and so must preempt when it grows."""
    return cluster_config(
        model,
        p(cache={"num_blocks": 128}),
        *(d(name) for name in DECODE_NODES),
        cache={"num_blocks": POOL},
        router={"max_attempts": 50, "node_wait_s": 60.0, "decode_routing": "round_robin"},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        cluster={"restart_backoff_max_s": 0.2, "peer_timeout_s": 3.0},
        storage={"resume": "storage", "min_read_tokens": 16, **storage},
        engine=fake_engine(step_s=0.002, num_kv_heads=8, head_dim=64),
    )


# ---------------------------------------------------------------- file


def reservations(index: Path) -> set[Reservation]:
    """Return slot and generation of each entry of a file store's index that somebody has begun to fill."""
    entries = np.fromfile(index, "<u8", offset=SETS_OFFSET).reshape(-1, ENTRY_BYTES // 8)
    begun = ~entries[:, :4].any(axis=1) & (entries[:, 4] != 0)
    return {(int(slot), int(entries[slot, 4])) for slot in np.flatnonzero(begun)}


class Killer:
    """Kills decode nodes while one of them writes. ``cut``: reservations that dead writers left behind."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cut: set[Reservation] = set()
        self._cluster = cluster
        self._path = path
        self._rng = random.Random(41)
        self._killed: set[int] = set()
        self._seen_s: dict[Reservation, float] = {}

    def kill_some(self) -> None:
        (index,) = until("the store is there", lambda: list(self._path.rglob("index")))
        for _ in range(DEATHS_A_ROUND):
            pids = until("two decode nodes run", self._alive)
            self._rng.shuffle(pids)
            deadline_s = time.monotonic() + PATIENCE_S
            while not self._kill_if_writing(index, pids):
                assert time.monotonic() < deadline_s, "nobody writes"
                time.sleep(WRITE_S)
            self._killed.add(pids[0])
        until("all are back", lambda: len(self._alive()) == len(DECODE_NODES))
        self._note_cut(reservations(index))

    def _alive(self) -> list[int]:
        """Return the decode nodes that run, if they are two at least."""
        nodes = {node["name"]: node["pid"] for node in self._cluster.status()["nodes"]}
        pids = [pid for name in DECODE_NODES if (pid := nodes.get(name)) and pid not in self._killed]
        return pids if len(pids) > 1 else []

    def _kill_if_writing(self, index: Path, pids: list[int]) -> bool:
        """If something is being written, let all stand still; if it still is, kill the first. The others go on."""
        begun = reservations(index)
        self._note_cut(begun)
        if begun <= self._seen_s.keys():
            return False
        with stopped(pids):
            for pid in pids:
                until("it stands still", lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED)  # type: ignore[misc]
            begun = reservations(index)
            if begun <= self._seen_s.keys():
                return False
            self._seen_s |= dict.fromkeys(begun - self._seen_s.keys(), time.monotonic())
            os.kill(pids[0], signal.SIGKILL)
            return True

    def _note_cut(self, begun: set[Reservation]) -> None:
        """Note what is so old that nobody can be filling it any more."""
        long_ago_s = time.monotonic() - 1000 * WRITE_S
        self.cut |= {one for one in begun if self._seen_s.get(one, math.inf) < long_ago_s}


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Let these processes stand still meanwhile; they may die."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.mark.fault("F22")
@pytest.mark.timeout(300)
def test_decode_nodes_are_killed_while_they_write_to_files(model: Path, tmp_path: Path) -> None:
    config = storing_cluster(model, {"backend": "file", "path": str(tmp_path / "kv"), "capacity": 24 * MiB})
    with running(config) as cluster:
        killer = Killer(cluster, tmp_path / "kv")
        for number in range(NUM_DEATHS // DEATHS_A_ROUND):
            assert under_load(cluster, 40 + number, killer.kill_some) >= AT_ONCE
        requests = cluster.status()["requests"]
        assert requests["nodes_lost"] >= NUM_DEATHS
        assert requests["failed"] == 0
        assert counted(cluster, "store_corrupt_blocks") == 0
        report = run(verified(cluster))
    assert killer.cut, "no write was cut off"
    assert report.num_blocks > 100
    assert report.num_corrupt == 0


async def verified(cluster: Cluster) -> VerifyReport:
    """Read everything in the store of ``cluster``."""
    (node,) = [node for node in cluster.config.nodes if node.name == "d0"]
    store = make_store(node.storage, fake_geometry(cluster.fake(), node.cache.block_size), Clock())
    await store.open()
    try:
        return await store.verify()
    finally:
        await store.close()


# ---------------------------------------------------------------- redis


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    if binary() is None:
        pytest.skip("no redis-server here")
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def storing(model: Path, server: RedisServer) -> Iterator[Cluster]:
    with running(storing_cluster(model, redis_storage(server))) as cluster:
        yield cluster


def redis_storage(server: RedisServer) -> dict[str, object]:
    return {"backend": "redis", "url": server.url, "timeout_s": 1.0, "read_timeout_s": 0.3}


@pytest.mark.fault("F22", "F30")
def test_redis_is_gone_for_a_while(model: Path) -> None:
    if binary() is None:
        pytest.skip("no redis-server here")
    with redis_server() as server, running(storing_cluster(model, redis_storage(server))) as cluster:
        go_on_without(cluster, server)


def go_on_without(storing: Cluster, server: RedisServer) -> None:
    def restart() -> None:
        until("KV is read", lambda: counted(storing, "kv_blocks_loaded") > 0)
        server.kill()
        time.sleep(REDIS_GONE_S)  # how long it is gone is the fault
        server.start()
        failed = counted(storing, "store_errors") + counted(storing, "store_skipped")
        loaded = counted(storing, "kv_blocks_loaded")
        assert failed > 0
        until("KV is read again", lambda: counted(storing, "kv_blocks_loaded") > loaded + 50)

    assert under_load(storing, 50, restart) >= AT_ONCE
    assert storing.status()["requests"]["failed"] == 0


@pytest.mark.fault("F22")
def test_redis_stands_still_for_a_while(storing: Cluster, server: RedisServer) -> None:
    def stop() -> None:
        before = counted(storing, "store_timeouts") + counted(storing, "store_errors")
        with server.stopped():
            time.sleep(REDIS_STOPPED_S)  # likewise
            until("nodes wait for it", lambda: failures() > before)
        loaded = counted(storing, "kv_blocks_loaded")
        until("KV is read again", lambda: counted(storing, "kv_blocks_loaded") > loaded + 20)

    def failures() -> float:
        return counted(storing, "store_timeouts") + counted(storing, "store_errors")

    assert under_load(storing, 51, stop) >= AT_ONCE
    assert storing.status()["requests"]["failed"] == 0


@pytest.mark.fault("F22")
def test_redis_has_other_bytes_than_were_written(storing: Cluster, server: RedisServer) -> None:
    """Flipped, missing, surplus and foreign ones, in all values again and again."""
    rng = random.Random(52)

    def spoil() -> None:
        before = counted(storing, "store_corrupt_blocks")
        with server.client() as client:

            def bad_values_were_read() -> bool:
                spoil_all(client, rng)
                return corrupt() > before + 20

            until("bad values were read", bad_values_were_read)

    def corrupt() -> float:
        return counted(storing, "store_corrupt_blocks")

    assert under_load(storing, 52, spoil) >= AT_ONCE
    assert storing.status()["requests"]["failed"] == 0


def spoil_all(client: redis.Redis, rng: random.Random) -> None:
    """Replace every value by a bad one."""
    last = b""
    for key in list(client.scan_iter("kvrelay:kv:*")):
        value = client.get(key)
        if not value:
            continue
        assert isinstance(value, bytes)
        place = rng.randrange(len(value))
        bad = [
            value[:place] + bytes([value[place] ^ 255]) + value[place + 1 :],
            value[:place],
            value + b"more",
            b"",
            last or b"short",
        ]
        client.set(key, rng.choice(bad), keepttl=True)
        last = value


@pytest.mark.fault("F22")
def test_redis_is_full(storing: Cluster, server: RedisServer) -> None:
    with server.client() as client:

        def fill() -> None:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 4 * MiB)
            before = counted(storing, "kv_blocks_not_saved")
            until("blocks could not be saved", lambda: counted(storing, "kv_blocks_not_saved") > before + 50)
            client.config_set("maxmemory", 0)
            saved = counted(storing, "kv_blocks_saved")
            until("blocks are saved again", lambda: counted(storing, "kv_blocks_saved") > saved + 50)

        assert under_load(storing, 53, fill) >= AT_ONCE
    assert storing.status()["requests"]["failed"] == 0
