"""The rooms every backend contract test runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from mooncake_master import MooncakeMaster, mooncake_master, why_no_mooncake
from storage_rooms import FileRoom, MemoryRoom, MooncakeRoom, OwnerRoom, RedisRoom, Room
from support.redis_server import RedisServer, binary, redis_cluster, redis_server

ROOMS = ("memory", "file", "redis", "redis cluster", "owner", "mooncake")

# Servers are started once, before the first test that may use them, so that no test is blamed for leaving them behind.


@pytest.fixture(scope="session")
def redis_one() -> Iterator[RedisServer | None]:
    """One Redis server; None if there is no binary."""
    if binary() is None:
        yield None
        return
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis_three() -> Iterator[list[RedisServer]]:
    """A Redis Cluster of three primaries; empty if there is no binary."""
    if binary() is None:
        yield []
        return
    with redis_cluster() as servers:
        yield servers


@pytest.fixture(scope="session")
def mooncake() -> Iterator[MooncakeMaster | str]:
    """A Mooncake master, or the reason why there is none."""
    if reason := why_no_mooncake():
        yield reason
        return
    with mooncake_master() as master:
        yield master


@pytest.fixture(params=("memory", "file"))
def bounded_room(request: pytest.FixtureRequest, tmp_path: Path) -> Room:
    """The backends that drop the least recently used block at ``capacity``; the others have rules of their own."""
    return MemoryRoom() if request.param == "memory" else FileRoom(tmp_path)


@pytest.fixture(params=ROOMS)
def room(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    redis_one: RedisServer | None,
    redis_three: list[RedisServer],
    mooncake: MooncakeMaster | str,
) -> Iterator[Room]:
    """One backend after the other."""
    match request.param:
        case "memory":
            yield MemoryRoom()
        case "file":
            yield FileRoom(tmp_path)
        case "redis":
            if redis_one is None:
                pytest.skip("no redis-server here")
            with redis_one.client() as client:
                yield RedisRoom(client, redis_one.url)
        case "owner":
            if redis_one is None:
                pytest.skip("no redis-server here")
            yield OwnerRoom(tmp_path, redis_one)
        case "redis cluster":
            if not redis_three:
                pytest.skip("no redis-server here")
            cluster = redis.RedisCluster(host="127.0.0.1", port=redis_three[0].port)
            yield RedisRoom(cluster, redis_three[1].url)
            cluster.close()
        case "mooncake":
            if isinstance(mooncake, str):
                pytest.skip(mooncake)
            yield MooncakeRoom(mooncake)
