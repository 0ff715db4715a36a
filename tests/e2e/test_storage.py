"""Clusters with a real checkpoint and a KV store: requests that give way and chats that go on, as on one node."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from typing import Any

import pytest
from support.asking import Answer, Ask, Asker, answers, at_once, play, random_prompt
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, p
from support.cluster_fixtures import WriteCheckpoint
from support.redis_server import binary, redis_server
from test_preemption import POOL, asked

BLOCK_SIZE = 16
LENGTHS = (20, 33, 48, 5, 64, 17)
STORAGE = {"resume": "storage", "min_read_tokens": BLOCK_SIZE, "timeout_s": 20.0, "read_timeout_s": 20.0}
"""Times for a busy machine: what is not read in time is computed, and that would be seen here."""

TIGHT: dict[str, Any] = {
    "router": {"prefill_routing": "round_robin", "decode_routing": "round_robin"},
    "scheduler": {"reserve_policy": "none", "watermark": 0.0},
}
"""Nodes that admit whatever fits now, and so must preempt when it grows."""


@pytest.fixture(scope="module")
def files(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """2P2D of one host, which share one directory; of the decode nodes one has hardly any room."""
    nodes = [
        *(p(name, cache={"num_blocks": 1024}) for name in ("p0", "p1")),
        d("d0", cache={"num_blocks": POOL}),
        d("d1", cache={"num_blocks": 4 * POOL}),
    ]
    storage = {"backend": "file", "path": str(tmp_path_factory.mktemp("kv")), "capacity": "64MiB", **STORAGE}
    with running(cluster_config(checkpoint("qwen2"), *nodes, **TIGHT, storage=storage)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def through_redis(checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    """1P2D that keep their KV in Redis; no decode node has room for three requests."""
    if binary() is None:
        pytest.skip("no redis-server here")
    nodes = [p(cache={"num_blocks": 1024}), *(d(name, cache={"num_blocks": POOL}) for name in ("d0", "d1"))]
    with redis_server() as server:
        storage = {"backend": "redis", "url": server.url, **STORAGE}
        with running(cluster_config(checkpoint("qwen2"), *nodes, **TIGHT, storage=storage)) as cluster:
            yield cluster


@pytest.mark.timeout(300)
def test_preempted_requests_resume_from_files(files: Cluster, mixed_node: Cluster) -> None:
    assert_resumed_from_the_store(files, mixed_node)


@pytest.mark.timeout(300)
def test_preempted_requests_resume_from_redis(through_redis: Cluster, mixed_node: Cluster) -> None:
    assert_resumed_from_the_store(through_redis, mixed_node)


def assert_resumed_from_the_store(cluster: Cluster, mixed_node: Cluster) -> None:
    asks = list(starmap(asked, enumerate(LENGTHS * 5)))

    given = answers(cluster, asks, limit=15)
    alone = answers(mixed_node, asks, limit=15)
    cluster.wait_until_quiescent()

    assert_equal(given, alone)
    counters = cluster.counters()
    assert counters["preemptions"] > 0
    assert counters["kv_blocks_loaded"] > 0
    assert counters["kv_blocks_loaded"] == counters["store_hit_blocks"]
    assert counters["kv_bytes_saved"] == counters["store_written_bytes"] > 0
    assert counters["store_errors"] == counters["store_timeouts"] == counters["store_corrupt_blocks"] == 0


def assert_equal(given: list[Answer], alone: list[Answer]) -> None:
    """Check for the same tokens, and logprobs as near as batches of other sizes allow."""
    assert [answer.token_ids for answer in given] == [answer.token_ids for answer in alone]
    for ours, theirs in zip(given, alone, strict=True):
        assert logprobs(ours) == pytest.approx(logprobs(theirs), rel=0, abs=1e-4)


def logprobs(answer: Answer) -> list[float]:
    found: list[float] = answer.body["choices"][0]["logprobs"]["token_logprobs"]
    return found


@pytest.mark.timeout(300)
def test_a_preempted_request_resumes_on_the_node_that_has_room(files: Cluster, mixed_node: Cluster) -> None:
    """Its client sees all tokens once."""
    files.wait_until_quiescent()
    asks = [asked(6 + number, length) for number, length in enumerate(LENGTHS)]
    before = files.status()["requests"]

    async def stream(asker: Asker) -> list[list[dict[str, Any]]]:
        return await at_once(len(asks), [partial(asker.stream, "/v1/completions", ask.body) for ask in asks])

    streams = play(files, stream)
    alone = answers(mixed_node, asks)
    files.wait_until_quiescent()

    after = files.status()["requests"]
    assert after["moved"] > before["moved"]
    assert after["failed"] == before["failed"]
    assert after["retries"] == before["retries"]
    choices = [[choice for part in parts for choice in part["choices"]] for parts in streams]
    tokens = [[token for choice in parts for token in choice["token_ids"]] for parts in choices]
    assert tokens == [answer.token_ids for answer in alone]
    for parts, answer in zip(choices, alone, strict=True):
        told = [logprob for choice in parts if choice["logprobs"] for logprob in choice["logprobs"]["token_logprobs"]]
        assert told == pytest.approx(logprobs(answer), rel=0, abs=1e-4)
    assert_timelines_tell(files, [parts[0]["id"] for parts in streams], after["moved"] - before["moved"])


def assert_timelines_tell(cluster: Cluster, request_ids: list[str], num_moved: int) -> None:
    """Check that the moves are in the timelines of the requests, each between a preemption and a read elsewhere."""
    marks = [
        [(mark["name"], mark["node"]) for mark in cluster.http.get(f"/cluster/requests/{request_id}").json()["marks"]]
        for request_id in request_ids
    ]
    assert sum(names.count(("moved", "router")) for names in marks) == num_moved
    moved = [names for names in marks if ("moved", "router") in names]
    for names in moved:
        assert names.index(("preempted", "d0")) < names.index(("moved", "router"))
    assert any(("load", "d1") in names[names.index(("moved", "router")) :] for names in moved), moved


@pytest.mark.timeout(300)
def test_each_turn_of_a_chat_begins_where_the_last_one_ended_on_another_node(
    files: Cluster, mixed_node: Cluster
) -> None:
    files.wait_until_quiescent()
    rng, before = random.Random(60), files.counters()
    prompt, asks, given, num_stored = random_prompt(rng, 60), list[Ask](), list[Answer](), [0]

    for _ in range(4):
        asks.append(Ask(prompt, 20, more={"logprobs": 1}))
        given += answers(files, asks[-1:])
        prompt = prompt + given[-1].token_ids
        num_stored.append((len(prompt) - 1) // BLOCK_SIZE)  # the newest token has no KV yet
        until("the turn is stored", lambda: num_saved(files) - before["kv_blocks_saved"] == num_stored[-1])
        prompt = prompt + random_prompt(rng, 16)
    files.wait_until_quiescent()

    cached = [answer.body["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in given]
    assert cached == [num_blocks * BLOCK_SIZE for num_blocks in num_stored[:-1]]
    computed = files.counters()["prefill_tokens"] - before["prefill_tokens"]
    assert computed == sum(len(ask.prompt) for ask in asks) - sum(cached)
    assert all(files.loads()[name]["counters"]["kv_blocks_loaded"] > 0 for name in ("p0", "p1"))
    assert_equal(given, answers(mixed_node, asks))


def num_saved(cluster: Cluster) -> float:
    return float(sum(load["counters"].get("kv_blocks_saved", 0) for load in cluster.loads().values()))
