"""Hosts that keep their KV on their own disks: a chat goes on at any of them, whoever has it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.asking import Answer, Ask, answers, assert_right, random_prompt
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p
from support.redis_server import binary, redis_server

BLOCK_SIZE = 16
PREFILL_NODES = ("p0", "p1")
PATIENT = {"timeout_s": 20.0, "read_timeout_s": 20.0}
"""What is not read in time is computed, and that would be seen here."""


@pytest.fixture
def hosts(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """2P1D as on two hosts: one prefill node shares the decode node's directory, the other has one of its own."""
    if binary() is None:
        pytest.skip("no redis-server here")
    here, there = ({"path": str(tmp_path / name)} for name in ("here", "there"))
    with redis_server() as server:
        config = cluster_config(
            model,
            *(p(name, storage=path) for name, path in zip(PREFILL_NODES, (here, there), strict=True)),
            d(storage=here),
            cache={"num_blocks": 256},
            router={"prefill_routing": "round_robin"},
            storage={
                "backend": "redis",
                "url": server.url,
                "payload": "owner",
                "capacity": "16MiB",
                "min_read_tokens": BLOCK_SIZE,
                **PATIENT,
            },
            engine=fake_engine(),
        )
        with running(config) as cluster:
            yield cluster


def test_each_turn_of_a_chat_is_read_from_the_host_that_has_it(hosts: Cluster) -> None:
    rng = random.Random(60)
    prompt, asks, given, num_stored = random_prompt(rng, 60), list[Ask](), list[Answer](), [0]

    for _ in range(4):
        asks.append(Ask(prompt, 20))
        given += answers(hosts, asks[-1:])
        prompt = prompt + given[-1].token_ids
        num_stored.append((len(prompt) - 1) // BLOCK_SIZE)  # the newest token has no KV yet
        until("the turn is stored", lambda: hosts.loads()["d0"]["counters"].get("kv_blocks_saved") == num_stored[-1])
        prompt = prompt + random_prompt(rng, 16)
    hosts.wait_until_quiescent()

    assert assert_right(hosts, asks, given) == len(asks)
    cached = [answer.body["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in given]
    assert cached == [num_blocks * BLOCK_SIZE for num_blocks in num_stored[:-1]]
    assert hosts.counters()["prefill_tokens"] == sum(len(ask.prompt) for ask in asks) - sum(cached)
    loaded = {name: hosts.loads()[name]["counters"]["kv_blocks_loaded"] for name in PREFILL_NODES}
    assert all(loaded.values()), loaded
