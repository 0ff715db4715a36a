"""Workers that die, hang, are too many or not needed any more: one request's fault costs one request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import psutil
import pytest
from fake_nodes import ANSWER, FakeCluster, Script, fake_cluster, until

LONG = json.dumps({"prompt": "ab" * (2 << 20)}).encode()
"""Takes a worker some seconds."""
MEDIUM = json.dumps({"prompt": "ab" * (32 << 10)}).encode()
"""Takes a worker, and not long."""


def run(scenario: Callable[[FakeCluster], Awaitable[None]], **router: object) -> None:
    async def with_cluster() -> None:
        async with fake_cluster(Script(), "prefill decode", **router) as cluster:
            await scenario(cluster)
            await cluster.quiet()

    asyncio.run(with_cluster())


OTHERS: set[psutil.Process] = set()
"""Servers that the session's fixtures have started: children of this process that are no workers."""


@pytest.fixture(autouse=True)
def children_of_the_session() -> None:
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


def workers() -> list[psutil.Process]:
    return [child for child in set(psutil.Process().children()) - OTHERS if memory_of(child) > 0]


def busy_workers() -> list[psutil.Process]:
    """Return the workers that have begun: their imports take a tenth of that."""
    return [worker for worker in workers() if memory_of(worker) > 120 << 20]


def memory_of(process: psutil.Process) -> int:
    """Return the resident bytes of ``process``; none if it has ended, perhaps since it was listed, as a zombie has."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


async def tokenize(cluster: FakeCluster, content: bytes) -> httpx.Response:
    return await cluster.client.post("/tokenize", content=content)


def failure(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_short_bodies_start_no_worker_and_long_ones_share_them() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        assert (await tokenize(cluster, b'{"prompt": "abc"}')).status_code == 200
        assert not workers()
        for _ in range(2):
            assert (await tokenize(cluster, MEDIUM)).json()["count"] == 64 << 10
            assert len(workers()) == 1
        both = await asyncio.gather(*(tokenize(cluster, MEDIUM) for _ in range(6)))
        assert [response.status_code for response in both] == [200] * 6
        assert len(workers()) == 2

    run(scenario)
    assert not workers()


def test_worker_ends_after_a_long_body() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        content = json.dumps({"prompt": "ab" * (600 << 10)}).encode()
        assert (await tokenize(cluster, content)).json()["count"] == 1200 << 10
        await until(lambda: not workers())
        assert (await tokenize(cluster, MEDIUM)).status_code == 200

    run(scenario)


def test_worker_that_is_killed_costs_its_request_only() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        lost = asyncio.create_task(tokenize(cluster, LONG))
        await until(busy_workers)
        (worker,) = workers()
        other = asyncio.create_task(tokenize(cluster, MEDIUM))
        body = {"prompt": "a", "max_tokens": 5, "seed": 0}
        short = await cluster.client.post("/v1/completions", json=body)
        assert short.json()["choices"][0]["text"] == ANSWER[:5]
        worker.kill()
        assert failure(await lost) == (503, "preparation_failed")
        assert (await other).status_code == 200
        assert (await tokenize(cluster, MEDIUM)).status_code == 200

    run(scenario)


def test_worker_that_dies_while_idle_costs_nothing() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        assert (await tokenize(cluster, MEDIUM)).status_code == 200
        (worker,) = workers()
        worker.kill()
        assert (await tokenize(cluster, MEDIUM)).status_code == 200

    run(scenario)


def test_worker_that_takes_too_long_is_ended() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await tokenize(cluster, LONG)
        assert failure(response) == (503, "preparation_failed")
        assert "not prepared within 0.5 s" in response.json()["error"]["message"]
        await until(lambda: not workers())

    run(scenario, preparation_timeout_s=0.5)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_client_that_leaves_ends_its_worker(path: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        request = asyncio.create_task(cluster.client.post(path, content=LONG))
        await until(workers)
        request.cancel()
        await until(lambda: not workers())
        assert (await tokenize(cluster, MEDIUM)).status_code == 200

    run(scenario)


def test_too_many_long_bodies_are_429() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        assert (await tokenize(cluster, MEDIUM)).status_code == 200
        (worker,) = workers()
        worker.suspend()  # or it may have ended one before the last has come
        asked = [asyncio.create_task(tokenize(cluster, MEDIUM)) for _ in range(20)]
        await until(lambda: sum(one.done() for one in asked) >= 20 - 9)
        worker.resume()
        responses = await asyncio.gather(*asked)
        refused = [response for response in responses if response.status_code != 200]
        assert len(refused) == 20 - 9
        assert {failure(response) for response in refused} == {(429, "queue_full")}
        assert {response.headers["retry-after"] for response in refused} == {"1"}

    run(scenario, preparation_workers=1)


def test_router_that_stops_at_once_ends_busy_workers() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        lost = asyncio.create_task(tokenize(cluster, LONG))
        await until(workers)
        cluster.service.stop()
        cluster.service.stop()
        assert failure(await lost) == (503, "preparation_failed")

    run(scenario)
    assert not workers()
