"""A healthy 1P3D cluster and the things clients do to it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from support.asking import Answer, Ask, Asker, answers, assert_right, at_once, play, random_asks, random_prompt
from support.cluster import Cluster

from kvrelay.engine.fake import fake_geometry

MAX_QUEUED_REQUESTS = 192


def test_many_requests_at_once_get_the_reference_tokens(fake_cluster: Cluster) -> None:
    asks = random_asks(1, 100, longest=300, shared=random_prompt(random.Random(0), 64))

    given = answers(fake_cluster, asks, limit=32)

    assert assert_right(fake_cluster, asks, given) == len(asks)


def test_streams_hold_the_same_tokens(fake_cluster: Cluster) -> None:
    asks = random_asks(2, 24)

    async def stream(asker: Asker) -> list[list[int]]:
        return await at_once(24, [lambda ask=ask: asker.stream_tokens(ask) for ask in asks])  # type: ignore[misc]

    assert play(fake_cluster, stream) == [ask.expected(fake_cluster.fake()) for ask in asks]


@pytest.mark.fault("F08")
def test_clients_that_leave_at_any_moment_leave_nothing_behind(fake_cluster: Cluster) -> None:
    rng = random.Random(3)
    stayers = random_asks(3, 20)

    async def impatient(asker: Asker) -> None:
        ask = Ask(random_prompt(rng, rng.randint(1, 400)), 400)
        if rng.random() < 0.5:
            await asker.hang_up(ask, rng.randint(1, 6))
        else:
            await asyncio.wait({leaver := asyncio.ensure_future(asker.ask(ask))}, timeout=rng.uniform(0, 0.4))
            leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)

    async def storm(asker: Asker) -> list[list[int]]:
        leavers = at_once(32, [lambda: impatient(asker)] * 100)
        staying = at_once(4, [lambda ask=ask: asker.stream_tokens(ask) for ask in stayers])  # type: ignore[misc]
        _, tokens = await asyncio.gather(leavers, staying)
        return tokens

    aborted = fake_cluster.status()["requests"]["aborted"]

    assert play(fake_cluster, storm) == [ask.expected(fake_cluster.fake()) for ask in stayers]
    fake_cluster.wait_until_quiescent()
    assert fake_cluster.status()["requests"]["aborted"] > aborted


def test_prefix_hits_on_both_nodes_save_compute_and_transfer(fake_cluster: Cluster) -> None:
    # Ten full blocks, which are found again, and a partial one. The router knows the decode node that has them.
    ask = Ask(random_prompt(random.Random(4), 165), 8)
    block_bytes = fake_geometry(fake_cluster.fake(), 16).block_bytes

    rounds = [asked_alone(fake_cluster, ask) for _ in range(6)]

    given = [answer for (answer,), _ in rounds]
    assert [moved_bytes // block_bytes for _, moved_bytes in rounds] == [11, 1, 1, 1, 1, 1]
    cached = [answer.body["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in given]
    assert cached == [0, 160, 160, 160, 160, 160]
    assert assert_right(fake_cluster, [ask] * 6, given) == 6


def asked_alone(cluster: Cluster, *asks: Ask) -> tuple[list[Answer], float]:
    """Return the answers, and how many bytes of KV moved for them."""
    cluster.wait_until_quiescent()
    before = cluster.status()["requests"]["kv_bytes_moved"]
    given = answers(cluster, asks, limit=1)
    cluster.wait_until_quiescent()
    return given, cluster.status()["requests"]["kv_bytes_moved"] - before


@pytest.mark.fault("F17")
def test_one_token_needs_no_decode_node(fake_cluster: Cluster) -> None:
    asks = [Ask(random_prompt(random.Random(5), 50), 1)]

    given, moved_bytes = asked_alone(fake_cluster, *asks)

    assert assert_right(fake_cluster, asks, given) == 1
    assert moved_bytes == 0


@pytest.mark.fault("F04")
def test_several_prompts_and_choices_in_one_request(fake_cluster: Cluster) -> None:
    rng = random.Random(6)
    prompts = [random_prompt(rng, length) for length in (5, 40, 100)]
    body = {**Ask([], 12, temperature=0.8, seed=100).body, "prompt": prompts, "n": 3}

    answer = play(fake_cluster, lambda asker: asker.post("/v1/completions", body))

    expected = [
        Ask(prompt, 12, 0.8, seed=100 + which).expected(fake_cluster.fake()) for prompt in prompts for which in range(3)
    ]
    assert [choice["token_ids"] for choice in answer.body["choices"]] == expected
    assert answer.body["usage"]["completion_tokens"] == sum(map(len, expected))
    assert answer.body["usage"]["prompt_tokens"] == 145


def test_a_full_queue_is_429_with_retry_after(fake_cluster: Cluster) -> None:
    long = Ask([7], 2000, more={"n": 96})
    ask = Ask([8], 4)

    async def fill(asker: Asker) -> tuple[object, ...]:
        first, second = asker.streaming("/v1/completions", long.body), asker.streaming("/v1/completions", long.body)
        async with first as one, second as two:
            await asyncio.gather(anext(one), anext(two))
            refused = await asker.ask(ask)
        return refused.end, refused.headers.get("retry-after"), refused.body["error"]["type"]

    assert play(fake_cluster, fill) == ((429, "queue_full"), "1", "rate_limit_error")
    fake_cluster.wait_until_quiescent()
    assert assert_right(fake_cluster, [ask], answers(fake_cluster, [ask])) == 1


def test_an_id_in_use_is_replaced_and_free_again_afterwards(fake_cluster: Cluster) -> None:
    asks = [Ask([1, 2, 3], 1500), Ask([4, 5], 5), Ask([6], 5)]
    same = {"X-Request-Id": "the-same"}

    async def twice(asker: Asker) -> list[Answer]:
        first = asyncio.ensure_future(asker.ask(asks[0], **same))
        while (await asker.get("/cluster/requests/cmpl-the-same")).status == 404:
            pass
        second = await asker.ask(asks[1], **same)
        return [await first, second, await asker.ask(asks[2], **same)]

    first, second, third = play(fake_cluster, twice)

    assert {answer.headers["x-request-id"] for answer in (first, second, third)} == {"the-same"}
    assert first.body["id"] == third.body["id"] == "cmpl-the-same" != second.body["id"]
    assert assert_right(fake_cluster, asks, [first, second, third]) == 3


GOOD = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 4}
BAD_REQUESTS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "model_not_found"),
    ({"prompt": None}, 400, "invalid_request_error"),
    ({"prompt": ""}, 400, "invalid_request_error"),
    ({"prompt": []}, 400, "invalid_request_error"),
    ({"prompt": [[]]}, 400, "invalid_request_error"),
    ({"prompt": {"text": "x"}}, 400, "invalid_request_error"),
    ({"prompt": [1, "two"]}, 400, "invalid_request_error"),
    ({"prompt": [1 << 40]}, 400, "invalid_request_error"),
    ({"prompt": [-1]}, 400, "invalid_request_error"),
    ({"prompt": [1] * 5000}, 400, "context_length_exceeded"),
    ({"max_tokens": -1}, 400, "invalid_request_error"),
    ({"max_tokens": "four"}, 400, "invalid_request_error"),
    ({"prompt": [1] * 5000, "max_tokens": 100_000}, 400, "context_length_exceeded"),
    ({"temperature": 3.0}, 400, "invalid_request_error"),
    ({"top_p": -0.1}, 400, "invalid_request_error"),
    ({"n": 0}, 400, "invalid_request_error"),
    ({"n": 1000}, 400, "invalid_request_error"),
    ({"stop": [""]}, 400, "invalid_request_error"),
    ({"logprobs": 1000}, 400, "invalid_request_error"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_request_error"),
    ({"logit_bias": {"100000": 1}}, 400, "invalid_request_error"),
    ({"min_tokens": 9}, 400, "invalid_request_error"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_request_error"),
    ({"prompt": "x", "tools": [{"type": "function"}]}, 400, "invalid_request_error"),
]


def test_bad_requests_get_typed_errors_and_never_reach_a_node(fake_cluster: Cluster) -> None:
    before = fake_cluster.status()["requests"]

    async def ask_all(asker: Asker) -> list[tuple[int, str, set[str]]]:
        posts = [asker.post("/v1/completions", {**GOOD, **change}) for change, _, _ in BAD_REQUESTS]
        given = await asyncio.gather(*posts)
        return [(answer.status, answer.body["error"]["code"], set(answer.body["error"])) for answer in given]

    given = play(fake_cluster, ask_all)

    fields = {"message", "type", "param", "code"}
    assert given == [(status, code, fields) for _, status, code in BAD_REQUESTS]
    assert fake_cluster.status()["requests"]["submitted"] == before["submitted"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"a": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "' + b"x" * (17 << 20) + b'"}', 413),
    ],
    ids=["nothing", "half", "list", "not UTF-8", "deep", "long"],
)
def test_bodies_that_are_no_request(fake_cluster: Cluster, content: bytes, status: int) -> None:
    response = fake_cluster.http.post("/v1/completions", content=content)

    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_get_typed_errors(fake_cluster: Cluster) -> None:
    http = fake_cluster.http

    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
