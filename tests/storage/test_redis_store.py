"""The ``redis`` backends with real servers that are down, slow, full, guarded, or several."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.crc import key_slot
from storage_rooms import GEOMETRY, HASHES, TIMEOUT_S, HandClock, planes, views
from support.loops import run
from support.ports import free_ports
from support.redis_server import NUM_SLOTS, RedisServer, binary, redis_cluster, redis_server

from kvrelay.config.storage import StorageConfig
from kvrelay.errors import StorageError, StorageUnavailableError
from kvstore.storage.block_format import namespace_of
from kvstore.storage.factory import make_store
from kvstore.storage.interface import KVStore, PutOutcome
from kvstore.storage.store import PAUSE_S

pytestmark = pytest.mark.skipif(binary() is None, reason="no redis-server here")

WRITTEN, PRESENT, FAILED = PutOutcome.WRITTEN, PutOutcome.PRESENT, PutOutcome.FAILED
SOON_S = 0.1


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@asynccontextmanager
async def opened(url: str, clock: HandClock | None = None, **options: Any) -> AsyncIterator[KVStore]:
    config = StorageConfig(backend="redis", url=SecretStr(url), **{"timeout_s": TIMEOUT_S, **options})
    store = make_store(config, GEOMETRY, clock or HandClock())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def hits(store: KVStore, count: int) -> list[int]:
    """Return which of the first ``count`` blocks are there; each must be what ``planes`` says."""
    pool, expected = planes(count, None), planes(count)
    found = await store.get(HASHES[:count], views(pool))
    assert all((pool[:, :, index] == expected[:, :, index] * hit).all() for index, hit in enumerate(found))
    return [index for index, hit in enumerate(found) if hit]


# ---------------------------------------------------------------- down, slow, full


@pytest.mark.fault("F30")
def test_a_server_that_is_killed_and_started_again(server: RedisServer) -> None:
    async def check() -> None:
        clock = HandClock()
        async with opened(server.url, clock) as store:
            await store.put(HASHES[:5], views(planes(5)))
            server.kill()
            assert await hits(store, 5) == []
            assert await store.put(HASHES[:5], views(planes(5))) == [FAILED] * 5
            clock.now_s += PAUSE_S
            assert await store.longest_prefix(HASHES[:5]) == 0
            assert store.counters.errors == 2
            with pytest.raises(StorageUnavailableError, match=f"127.0.0.1:{server.port}"):
                await store.stats()
            await asyncio.to_thread(server.start)
            clock.now_s += PAUSE_S
            assert await store.put(HASHES[:5], views(planes(5))) == [WRITTEN] * 5
            assert await hits(store, 5) == [0, 1, 2, 3, 4]

    run(check())


def test_a_server_that_is_started_after_the_store(server: RedisServer) -> None:
    async def check() -> None:
        clock = HandClock()
        server.kill()
        async with opened(server.url, clock) as store:
            assert await hits(store, 2) == []
            await asyncio.to_thread(server.start)
            clock.now_s += PAUSE_S
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2

    run(check())


def test_a_server_that_dies_again_and_again_under_load(server: RedisServer) -> None:
    async def check() -> None:
        rng = random.Random(0)
        pool = planes(200)

        class RunningClock(HandClock):
            def now(self) -> float:
                self.now_s += PAUSE_S / 4
                return self.now_s

        async def use(store: KVStore) -> None:
            while not done.is_set():
                start = rng.randrange(180)
                span = slice(start, start + rng.randrange(1, 20))
                await store.put(HASHES[span], views(pool)[span])
                into = planes(200, None)
                found = await store.get(HASHES[span], views(into)[span])
                for index, delivered in enumerate(found, start):
                    assert (into[:, :, index] == pool[:, :, index] * delivered).all()
                    if delivered:
                        hit.set()

        done, hit = asyncio.Event(), asyncio.Event()
        async with opened(server.url, RunningClock()) as store:
            async with asyncio.TaskGroup() as users:
                for _ in range(4):
                    users.create_task(use(store))
                for _ in range(4):
                    hit.clear()
                    await hit.wait()
                    await asyncio.to_thread(server.kill)
                    await asyncio.to_thread(server.start)
                done.set()
            assert store.counters.corrupt_blocks == 0
            assert store.counters.hit_blocks > 0

    run(check())


def test_a_server_that_does_not_answer(server: RedisServer) -> None:
    async def check() -> None:
        clock = HandClock()
        async with opened(server.url, clock, timeout_s=SOON_S) as store:
            while FAILED in await store.put(HASHES[:5], views(planes(5))):  # on a busy machine any server may be late
                clock.now_s += PAUSE_S
            with server.stopped():
                assert await hits(store, 5) == []
                clock.now_s += PAUSE_S
                assert await store.put(HASHES[5:9], views(planes(4))) == [FAILED] * 4
            clock.now_s += PAUSE_S
            # What the server still has to say to calls that ended must not reach others.
            while await hits(store, 5) != [0, 1, 2, 3, 4]:
                clock.now_s += PAUSE_S
            assert store.counters.corrupt_blocks == 0

    run(check())


def test_a_key_of_somebody_else_is_left_alone(server: RedisServer) -> None:
    async def check() -> None:
        async with opened(server.url) as store:
            await store.put(HASHES[:2], views(planes(2)))
            prefix = f"kvrelay:kv:{namespace_of(GEOMETRY).hex()}:"
            with server.client() as client:
                for name in (b"", b"junk", b"\xff", b"0" * 63, b"G" * 64):
                    client.set(prefix.encode() + name, b"x")
                assert (await store.stats()).num_blocks == 2
                assert (await store.verify()).num_blocks == 2
                assert await store.clear() == 2
                assert len(client.keys(prefix + "*")) == 5

    run(check())


def test_a_server_that_is_full() -> None:
    async def check(server: RedisServer) -> None:
        async with opened(server.url) as store:
            await store.put(HASHES[:2], views(planes(2)))
            with server.client() as client:
                client.config_set("maxmemory", 1)
            assert await store.put(HASHES[:4], views(planes(4))) == [PRESENT] * 2 + [FAILED] * 2
            assert store.counters.errors == 2
            assert await hits(store, 4) == [0, 1]
            assert (await store.stats()).capacity_bytes == 1

    with redis_server() as server:
        run(check(server))


# ---------------------------------------------------------------- time to live


def test_blocks_live_for_a_time_after_their_last_use(server: RedisServer) -> None:
    async def check() -> None:
        async with opened(server.url, ttl_s=1000) as store:
            await store.put(HASHES[:3], views(planes(3)))
            with server.client() as client:
                keys = [store._backend._key(one) for one in HASHES[:3]]  # type: ignore[attr-defined]
                for key in keys:
                    assert 990 < client.ttl(key) <= 1000
                    client.expire(key, 500)
                await hits(store, 1)
                await store.put([HASHES[1]], views(planes(1)))
                assert [client.ttl(key) > 990 for key in keys] == [True, True, False]

    run(check())


# ---------------------------------------------------------------- ways in


def test_a_password_is_used_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: RedisServer) -> None:
        async with opened(f"redis://:hunter2@127.0.0.1:{server.port}/0") as store:
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
        async with opened(f"redis://user:hunter3@127.0.0.1:{server.port}/0") as store:
            assert await hits(store, 2) == []
            assert store.counters.errors == 1
            with pytest.raises(StorageUnavailableError) as caught:
                await store.stats()
            assert "hunter" not in str(caught.value)

    with redis_server("--requirepass", "hunter2") as server:
        run(check(server))
    assert "127.0.0.1" in caplog.text
    assert "hunter" not in caplog.text


def test_an_acl_user_with_no_more_than_it_needs() -> None:
    async def check(server: RedisServer) -> None:
        async with opened(f"redis://kvrelay:hunter2@127.0.0.1:{server.port}/0") as store:
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
            assert await hits(store, 2) == [0, 1]
            assert (await store.stats()).num_blocks == 2
            assert await store.clear() == 2
            assert store.counters.errors == 0

    # As in docs/operations.md.
    rule = "kvrelay on >hunter2 ~kvrelay:* &* +@read +@write +@connection +@transaction +info +cluster|slots"
    with redis_server("--user", *rule.split()) as server:
        run(check(server))


def test_a_unix_socket(server: RedisServer) -> None:
    async def check() -> None:
        async with opened(f"unix://{server.socket_path}?db=3") as store:
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
            assert await hits(store, 2) == [0, 1]
        with server.client(db=3) as client:
            assert client.dbsize() == 2

    run(check())


def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    [port] = free_ports(1)

    async def check(server: RedisServer) -> None:
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        async with opened(url) as store:
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
            assert await hits(store, 2) == [0, 1]

    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    try:
        with redis_server(*tls, "--tls-auth-clients", "no") as server:
            run(check(server))
    except RuntimeError as error:
        pytest.skip(f"this redis-server has no TLS: {error}")


@pytest.mark.parametrize("url", ["redis://:hunter2@host:port/0", "redis://:hunter2@[::1/0"])
def test_a_url_that_cannot_be_read_is_not_quoted(url: str) -> None:
    async def check() -> None:
        with pytest.raises(StorageError, match=r"storage\.url") as caught:
            async with opened(url):
                pass
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None

    run(check())


# ---------------------------------------------------------------- cluster


def test_a_cluster_that_loses_a_node() -> None:
    async def check(nodes: list[RedisServer]) -> None:
        clock = HandClock()
        async with opened(nodes[0].url, clock, timeout_s=1.0) as store:
            while FAILED in await store.put(HASHES[:60], views(planes(60))):  # on a busy machine any node may be late
                clock.now_s += PAUSE_S
            sizes = []
            for node in nodes:
                with node.client() as client:
                    sizes.append(client.dbsize())
            assert sum(sizes) == 60
            assert min(sizes) > 5
            # a node on a busy machine may be late too: then its blocks are there at another try
            with nodes[1].stopped():
                while (found := len(await hits(store, 60))) != 60 - sizes[1]:
                    assert found < 60 - sizes[1]
                    clock.now_s += PAUSE_S
            nodes[2].kill()
            while len(await hits(store, 60)) != 60 - sizes[2]:
                clock.now_s += PAUSE_S
            while (outcomes := await store.put(HASHES[:60], views(planes(60)))).count(PRESENT) != 60 - sizes[2]:
                clock.now_s += PAUSE_S
            assert outcomes.count(FAILED) == sizes[2]
            await asyncio.to_thread(nodes[2].start)
            while FAILED in await store.put(HASHES[:60], views(planes(60))):
                clock.now_s += PAUSE_S
            while len(await hits(store, 60)) != 60:
                clock.now_s += PAUSE_S

    with redis_cluster() as nodes:
        run(check(nodes))


def test_a_slot_that_moves_to_another_node() -> None:
    async def check(nodes: list[RedisServer]) -> None:
        async with opened(nodes[0].url) as store:
            assert await hits(store, 3) == []  # now it knows who has what
            slot = key_slot(store._backend._key(HASHES[0]).encode())  # type: ignore[attr-defined]
            with ExitStack() as stack:
                clients = [stack.enter_context(node.client()) for node in nodes]
                ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
                new = (slot * len(nodes) // NUM_SLOTS + 1) % len(nodes)
                for client in clients:
                    client.execute_command(f"CLUSTER SETSLOT {slot} NODE {ids[new]}")
                assert await store.put(HASHES[:3], views(planes(3))) == [WRITTEN] * 3
                assert clients[new].execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
            assert await hits(store, 3) == [0, 1, 2]

    with redis_cluster() as nodes:
        run(check(nodes))
