from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fake_nodes import ANSWER, FakeCluster, Script, fake_cluster, until

from kvrelay.protocol.ids import NodeId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from router.http.operators import make_operators_app

MESSAGES = [{"role": "user", "content": "hi"}]
Scenario = Callable[[FakeCluster], Awaitable[None]]


def run(scenario: Scenario, script: Script | None = None, roles: str = "prefill decode", **router: object) -> None:
    """Run ``scenario`` against a cluster; afterwards nothing may be left of any request."""

    async def with_cluster() -> None:
        async with fake_cluster(script, roles, **router) as cluster:
            await scenario(cluster)
            await cluster.quiet()

    asyncio.run(with_cluster())


async def post(cluster: FakeCluster, path: str, **body: object) -> dict[str, Any]:
    response = await cluster.client.post(path, json={"model": "demo", "seed": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(cluster: FakeCluster, path: str, **body: object) -> list[Any]:
    """Return the stream's chunks, read as strictly as the standard has it."""
    response = await cluster.client.post(path, json={"model": "demo", "seed": 0, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


# ---------------------------------------------------------------- answers


def test_completion() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/completions", prompt="Hello", max_tokens=12)
        assert answer.pop("id").startswith("cmpl-")
        assert answer.pop("created") > 1.7e9
        assert answer == {
            "object": "text_completion",
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "text": ANSWER[:12],
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 12,
                "total_tokens": 17,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }

    run(scenario)


def test_chat() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/chat/completions", messages=MESSAGES, max_completion_tokens=3)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": ANSWER[:3], "refusal": None}
        assert answer["usage"]["prompt_tokens"] == len("user: hi\nassistant: ")

    run(scenario)


def test_several_prompts_and_n_make_choices_in_order_with_seeds_of_their_own() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/completions", prompt=["ab", "ABC"], n=2, max_tokens=4, seed=7)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [ANSWER[1:5], ANSWER[:4]] * 2
        assert answer["usage"]["prompt_tokens"] == 5
        assert answer["usage"]["completion_tokens"] == 16
        assert sorted(spec.sampling.seed for spec in cluster.script.specs if not spec.output_token_ids) == sorted(
            [7, 8] * 2 * 2
        )

    run(scenario)


def test_unset_seed_is_drawn_anew_for_each_request() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for _ in range(2):
            await post(cluster, "/v1/completions", prompt="a", max_tokens=1, seed=None)
        first, second = cluster.script.specs
        assert first.sampling.seed != second.sampling.seed

    run(scenario)


def test_echo_puts_the_prompt_before_the_text() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for prompt in ("Hé", list("Hé".encode())):
            ids = cluster.model.tokenizer.encode("Hé") if prompt != "Hé" else prompt
            answer = await post(cluster, "/v1/completions", prompt=ids, echo=True, max_tokens=3)
            assert answer["choices"][0]["text"] == "Hé" + ANSWER[:3]
            chunks = await stream(cluster, "/v1/completions", prompt=ids, echo=True, max_tokens=3)
            assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hé" + ANSWER[0], ANSWER[1], ANSWER[2]]

    run(scenario, Script(in_step=True))


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029", "\x0b", "\x1c", "\r\n"])
def test_no_character_of_a_text_is_a_line_break_to_any_client(separator: str) -> None:
    """Clients with ``str.splitlines`` (httpx's ``iter_lines``) also split at Unicode's separators."""
    prompt = f"a{separator}b"

    async def scenario(cluster: FakeCluster) -> None:
        body = {"model": "demo", "prompt": prompt, "echo": True, "max_tokens": 1, "seed": 0, "stream": True}
        async with cluster.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        first, *_, last = lines
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == prompt + ANSWER[0]
        assert last == "data: [DONE]"
        assert all(line.startswith("data: ") for line in lines)

    run(scenario, Script(in_step=True))


def test_max_tokens_is_16_or_for_chats_all_there_is_room_for_and_never_more_than_that() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for unset in ({}, {"max_tokens": None}):
            answer = await post(cluster, "/v1/completions", prompt="a", **unset)
            assert answer["usage"]["completion_tokens"] == 16
            answer = await post(cluster, "/v1/chat/completions", messages=MESSAGES, **unset)
            assert answer["usage"]["total_tokens"] == 512
        answer = await post(cluster, "/v1/completions", prompt=[65] * 500)
        assert answer["usage"]["completion_tokens"] == 12
        for name in ("max_tokens", "max_completion_tokens"):
            answer = await post(cluster, "/v1/chat/completions", messages=MESSAGES, **{name: 10**6})
            assert answer["usage"]["total_tokens"] == 512
            assert answer["choices"][0]["finish_reason"] == "length"
        answer = await post(cluster, "/v1/completions", prompt="a", max_tokens=512)
        assert answer["usage"]["total_tokens"] == 512

    run(scenario)


# ---------------------------------------------------------------- streams


def test_chat_stream_has_the_role_with_the_first_text_and_whole_characters() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        chunks = await stream(cluster, "/v1/chat/completions", messages=MESSAGES, max_tokens=40)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": "T"}
        assert all(list(delta) == ["content"] for delta in deltas[1:])
        text = "".join(delta["content"] for delta in deltas)
        assert text == ANSWER.encode()[:40].decode()
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert "usage" not in chunks[-1]

    run(scenario, Script(in_step=True))


def test_usage_comes_in_a_last_chunk_or_in_every_chunk() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        options: dict[str, bool] = {"include_usage": True}
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=3, stream_options=options)
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] == 4
        options["continuous_usage_stats"] = True
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=3, stream_options=options)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]

    run(scenario, Script(in_step=True))


@pytest.mark.parametrize(
    ("body", "num_chunks"),
    [
        ({"stop": ["T never to come"]}, 12),
        ({"stop": ["fox", "The fox says: no"]}, 7),
        ({}, 12),
    ],
)
def test_a_stream_has_a_chunk_per_token_with_text_or_without(body: dict[str, Any], num_chunks: int) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        chunks = await stream(cluster, "/v1/chat/completions", messages=MESSAGES, max_tokens=12, **body)
        assert len(chunks) == num_chunks
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert all(list(delta) == ["content"] for delta in deltas[1:])
        assert all("usage" not in chunk for chunk in chunks)

    run(scenario, Script(in_step=True))


def test_a_character_of_four_tokens_makes_four_chunks() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=8)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "", "", "🦊"] * 2

    run(scenario, Script(answer="🦊", in_step=True))


@pytest.mark.fault("F25")
def test_stream_and_answer_have_the_same_text_for_hostile_model_text() -> None:
    hostile = 'line\r\n\r\ndata: [DONE]\n\n"quoted\\" \x00 \u2028 🦊'

    async def scenario(cluster: FakeCluster) -> None:
        length = len(hostile.encode())
        whole = await post(cluster, "/v1/completions", prompt="a", max_tokens=length)
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=length)
        assert whole["choices"][0]["text"] == hostile
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == hostile

    run(scenario, Script(answer=hostile))


def test_choices_of_a_stream_come_interleaved_and_complete() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        chunks = await stream(cluster, "/v1/completions", prompt=["a", "b"], max_tokens=5)
        texts = ["", ""]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == [ANSWER[:5]] * 2

    run(scenario, Script(pace_s=0.001))


# ---------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stop": "END"}, ANSWER[: ANSWER.index("END")]),
        ({"stop": ["nowhere", "!"], "include_stop_str_in_output": True}, ANSWER[: ANSWER.index("!") + 1]),
        ({"stop": ["🦊"]}, ANSWER[: ANSWER.index("🦊")]),
        ({"stop": ["T"], "min_tokens": 1}, ANSWER[: ANSWER.index("Twice")]),
    ],
)
def test_stop_string_ends_answer_and_stream_alike(fields: dict[str, Any], text: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/completions", prompt="a", max_tokens=300, **fields)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        stops = fields["stop"] if isinstance(fields["stop"], list) else [fields["stop"]]
        assert choice["stop_reason"] in stops
        stop_end = len(ANSWER[: ANSWER.index(choice["stop_reason"], len(text) - 1)].encode())
        assert answer["usage"]["completion_tokens"] <= stop_end + len(choice["stop_reason"].encode())
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=300, **fields)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        await until(lambda: len(cluster.script.aborted) >= 2)

    run(scenario, Script(pace_s=0.0005))


def test_stop_token_id_is_not_shown_and_told_as_the_reason() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        (colon,) = cluster.model.tokenizer.encode(":")
        answer = await post(cluster, "/v1/completions", prompt="a", stop_token_ids=[colon], return_token_ids=True)
        (choice,) = answer["choices"]
        assert choice["text"] == ANSWER[: ANSWER.index(":")]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", colon)
        assert choice["token_ids"][-1] == colon
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])

    run(scenario)


# ---------------------------------------------------------------- details


def test_token_ids_as_vllm_returns_them() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        encode = cluster.model.tokenizer.encode
        answer = await post(cluster, "/v1/completions", prompt="ab", max_tokens=3, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == encode(ANSWER[:3])
        assert answer["choices"][0]["prompt_token_ids"] == encode("ab")
        chunks = await stream(cluster, "/v1/chat/completions", messages=MESSAGES, max_tokens=3, return_token_ids=True)
        assert chunks[0]["prompt_token_ids"] == encode("user: hi\nassistant: ")
        assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[i] for i in encode(ANSWER[:3])]
        assert "prompt_token_ids" not in chunks[1]

    run(scenario, Script(in_step=True))


def test_logprobs_of_completions() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/completions", prompt="a", max_tokens=2, logprobs=2)
        first, second = (cluster.model.tokenizer.decode([token_id]) for token_id in (0, 1))
        assert answer["choices"][0]["logprobs"] == {
            "text_offset": [0, 1],
            "token_logprobs": [-0.5, -0.5],
            "tokens": ["T", "h"],
            "top_logprobs": [{first: -1.0, second: -2.0, token: -0.5} for token in "Th"],
        }
        chunks = await stream(cluster, "/v1/completions", prompt="a", max_tokens=2, logprobs=0)
        assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1]]

    run(scenario, Script(in_step=True))


def test_logprobs_of_chats_tell_the_bytes_of_half_characters() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"messages": MESSAGES, "max_tokens": 18, "logprobs": True, "top_logprobs": 1}
        answer = await post(cluster, "/v1/chat/completions", **body)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == 18
        assert bytes(byte for item in content for byte in item["bytes"]) == ANSWER.encode()[:18]
        assert content[0]["token"] == "T"
        assert content[0]["logprob"] == -0.5
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0]

    run(scenario, Script(in_step=True))


def test_request_id_of_the_client_is_used_and_told_back() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": "a", "max_tokens": 2}
        response = await cluster.client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
        assert response.json()["id"] == "cmpl-mine-1"
        assert response.headers["x-request-id"] == "mine-1"
        await cluster.quiet()
        timeline = (await cluster.client.get("/cluster/requests/cmpl-mine-1")).json()
        assert {"received", "dispatched", "first_token", "done"} <= {mark["name"] for mark in timeline["marks"]}
        assert timeline["request_id"] == "cmpl-mine-1"

    run(scenario)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.fault("F04", "F08")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pace_s", [0.02, 60.0], ids=["after some tokens", "before the first"])
def test_client_gone_aborts_every_choice_on_every_node(streaming: bool, pace_s: float) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 400, "stream": streaming}
        request = asyncio.create_task(cluster.client.post("/v1/completions", json=body))
        await until(lambda: len(cluster.script.specs) >= (8 if pace_s < 1 else 4))
        request.cancel()
        await until(lambda: not cluster.service.machine.requests)
        await until(lambda: len({item.partition(":")[2] for item in cluster.script.aborted}) == 4)
        text = cluster.client.get("/metrics")
        assert 'kvrelay_requests_total{api="completions",outcome="aborted"} 4.0' in (await text).text

    run(scenario, Script(pace_s=pace_s))


@pytest.mark.fault("F04")
@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_several_choices_fails_and_the_others_are_aborted(streaming: bool) -> None:
    error = ErrorInfo(code="kv_cache_too_small", message="never fits", http_status=400)

    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 400, "stream": streaming}
        response = await cluster.client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "kv_cache_too_small")
        await until(lambda: not cluster.service.machine.requests)
        await until(lambda: len({item.partition(":")[2] for item in cluster.script.aborted}) >= 3)
        counters = cluster.service.machine.requests.counters
        assert (counters.failed, counters.aborted) == (1, 3)

    run(scenario, Script(pace_s=60.0, fail_with=error, fail_times=1, fail_at="n0"))


def delete(cluster: FakeCluster, name: str) -> Awaitable[httpx.Response]:
    """Cancel a request as an operator does."""
    app = make_operators_app(cluster.service)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.delete(f"/cluster/requests/{name}")

    return ask()


@pytest.mark.fault("F04", "F08")
@pytest.mark.parametrize("name", ["mine", "cmpl-mine", "cmpl-mine-1"])
@pytest.mark.parametrize("pace_s", [0.02, 60.0], ids=["after some tokens", "before the first"])
def test_cancelled_request_is_410_or_an_event_and_all_its_choices_end(name: str, pace_s: float) -> None:
    """By the client's id, the answer's, or one choice's: an answer without one of its choices is none."""

    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 400, "stream": True}
        lines: asyncio.Queue[str] = asyncio.Queue()

        async def ask() -> int:
            async with cluster.client.stream(
                "POST", "/v1/completions", json=body, headers={"X-Request-Id": "mine"}
            ) as response:
                async for line in response.aiter_lines():
                    lines.put_nowait(line)
                return response.status_code

        request = asyncio.create_task(ask())
        await until(lambda: len(cluster.script.specs) == 4 if pace_s > 1 else not lines.empty())
        answer = (await delete(cluster, name)).json()
        assert answer["status"] == "cancelled"
        cancelled = {item["request_id"]: item["state"] for item in answer["requests"]}
        assert cancelled == dict.fromkeys(
            [name] if name.endswith("1") else [f"cmpl-mine-{i}" for i in range(4)], "running"
        )
        status = await request
        said = [line for line in (lines.get_nowait() for _ in range(lines.qsize())) if line]
        if pace_s < 1:
            assert (status, said.pop()) == (200, "data: [DONE]")
        else:
            assert (status, len(said)) == (410, 1)
        assert json.loads(said[-1].removeprefix("data: "))["error"]["code"] == "request_cancelled"
        await until(lambda: not cluster.service.machine.requests)
        await until(lambda: len({item.partition(":")[2] for item in cluster.script.aborted}) == 4)
        assert cluster.service.machine.requests.counters.aborted == 4
        again = await delete(cluster, name)
        assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
        assert (await cluster.client.delete(f"/cluster/requests/{name}")).status_code == 405

    run(scenario, Script(pace_s=pace_s))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 400}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 400}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 400}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 400}),
    ],
    ids=["completions", "chat", "responses", "messages"],
)
def test_answers_of_all_apis_are_cancelled_by_the_clients_id(path: str, body: dict[str, Any]) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        name = "my_own-id"
        request = asyncio.create_task(cluster.client.post(path, json=body, headers={"X-Request-Id": name}))
        await until(lambda: bool(cluster.script.specs))
        for part in ("id", "own-id", "own"):
            assert (await delete(cluster, part)).status_code == 404
        assert (await delete(cluster, name)).status_code == 200
        assert (await request).status_code == 410

    run(scenario, Script(pace_s=60.0))


def test_queue_full_is_429_with_retry_after() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": "a", "max_tokens": 50}
        first = asyncio.create_task(cluster.client.post("/v1/completions", json=body))
        await until(lambda: len(cluster.service.machine.requests) == 1)
        for streaming in (False, True):
            refused = await cluster.client.post("/v1/completions", json={**body, "stream": streaming})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.json()["error"]["code"] == "queue_full"
        assert (await first).status_code == 200

    run(scenario, Script(pace_s=0.002), max_queued_requests=1)


def test_no_node_is_503() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_node_available"
        ready = await cluster.client.get("/ready")
        assert ready.status_code == 503
        assert "no decode node" in ready.json()["error"]["message"]

    run(scenario, roles="prefill", node_wait_s=0.01)


def test_error_of_a_node_has_its_own_status_before_the_stream_and_is_an_event_within() -> None:
    error = ErrorInfo(code="kv_cache_too_small", message="never fits", http_status=400)

    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": "a", "max_tokens": 20, "stream": True}
        early = await cluster.client.post("/v1/completions", json=body)
        assert early.status_code == 400
        assert early.json()["error"]["code"] == "kv_cache_too_small"
        prefill_node = cluster.service.machine.node_table.named(NodeId("n0"))
        assert prefill_node is not None
        cluster.script.fail_at, cluster.script.fail_times = "n1", 1  # the decode node, after the first token
        cluster.script.fail_when = lambda: not any(prefill_node.pending.values())
        late = await cluster.client.post("/v1/completions", json=body)
        assert late.status_code == 200
        *chunks, error_event, done, _ = late.text.split("\n\n")
        assert len(chunks) == 1
        assert json.loads(error_event.removeprefix("data: "))["error"]["message"] == "never fits"
        assert done == "data: [DONE]"

    run(scenario, Script(fail_with=error, fail_times=1, fail_at="n0"))


def test_retryable_failure_is_not_seen_by_the_client() -> None:
    error = ErrorInfo(code="transfer_failed", message="lost", http_status=503, retryable=True)

    async def scenario(cluster: FakeCluster) -> None:
        answer = await post(cluster, "/v1/completions", prompt="a", max_tokens=5)
        assert answer["choices"][0]["text"] == ANSWER[:5]
        assert cluster.service.machine.requests.counters.retries == 1

    run(scenario, Script(fail_with=error, fail_times=1))


def test_a_body_that_is_not_whole_when_the_server_ends_is_refused_like_others() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(cluster.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: router\r\nContent-Length: 100\r\n\r\n{")
        await until(lambda: any(connection.cycle for connection in cluster.connections))
        cluster.http.config.timeout_graceful_shutdown = 0
        cluster.http.should_exit = True
        answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["message"] == "the router is stopping"
        writer.close()

    run(scenario)


@pytest.mark.parametrize("header", ["X-Session-ID", "X-Session-Token"])
def test_requests_of_a_session_go_to_one_node(header: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        timelines = cluster.service.machine.requests.timelines
        used: dict[str, set[str]] = {}
        for index in range(28):
            session = f"user {index % 7}"  # an odd number: taking turns does not look like it
            headers = {header: session, "X-Request-ID": f"r{index}"}
            body = {"model": "demo", "prompt": "hi", "max_tokens": 1}
            response = await cluster.client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            request_id = RequestId(f"cmpl-r{index}")
            await until(lambda: nodes_of(timelines.get(request_id)))  # noqa: B023 (it is awaited here)
            used.setdefault(session, set()).update(nodes_of(timelines.get(request_id)))
        assert all(len(nodes) == 1 for nodes in used.values())
        assert set().union(*used.values()) == {"n0", "n1"}

    run(scenario, roles="mixed mixed", prefill_routing="session", decode_routing="session")


def nodes_of(timeline: Any) -> set[str]:
    """Return the nodes that have reported what they did of a request."""
    return {mark["node"] for mark in timeline["marks"] if mark["node"] != "router"}
