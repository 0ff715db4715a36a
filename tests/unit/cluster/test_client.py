"""The HTTP client of ``kvrelay status`` and ``kvrelay chat``, against a made-up router."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from kvrelay.cluster.cli import app
from kvrelay.cluster.client import ClusterClient, ClusterUnreachableError
from kvrelay.cluster.operate import reset_prefix_cache, restart
from kvrelay.cluster.up import Readiness
from kvrelay.errors import KVRelayError

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> ClusterClient:
    return ClusterClient("http://router", transport=httpx.MockTransport(handler))


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused", request=request)


def chunk(**delta: str) -> str:
    return "data: " + json.dumps({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta}]}) + "\n\n"


def chat_router(stream: str, requests: list[httpx.Request] | None = None) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        return httpx.Response(200, text=stream, headers={"content-type": "text/event-stream"})

    return handler


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (lambda _: httpx.Response(200), None),
        (lambda _: httpx.Response(503, json={"error": {"message": "no decode node"}}), "no decode node"),
        (lambda _: httpx.Response(503, json={"reason": "no decode node"}), "no decode node"),
        (lambda _: httpx.Response(502, text="<html>"), "502 Bad Gateway"),
        (refused, "the router does not answer yet"),
    ],
)
def test_readiness(handler: Handler, reason: str | None) -> None:
    with client_of(handler) as client:
        assert client.not_ready_because() == reason


def test_cluster_is_up_when_all_nodes_are_there_and_a_router_that_ends_meanwhile_is_waited_for() -> None:
    answers: list[Handler] = [
        lambda _: httpx.Response(200, json={"nodes": [{"name": "p0"}]}),
        refused,
        lambda _: httpx.Response(503, json={"error": {"message": "not now"}}),
        lambda _: httpx.Response(200, json={"nodes": [{"name": "d0"}, {"name": "p0"}]}),
    ]

    def router(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200) if request.url.path == "/ready" else answers.pop(0)(request)

    with client_of(router) as client:
        readiness = Readiness(client, ["p0", "d0"])
        assert readiness.not_up_because() == "d0 not registered yet"
        assert "no answer from http://router" in str(readiness.not_up_because())
        assert readiness.not_up_because() == "not now"
        assert readiness.not_up_because() is None
        assert len(readiness.status["nodes"]) == 2


def test_chat_streams_the_text_and_names_the_request() -> None:
    requests: list[httpx.Request] = []
    stream = chunk(role="assistant", content="He") + chunk(content="llo") + chunk() + "data: [DONE]\n\n"
    with client_of(chat_router(stream, requests)) as client:
        parts = list(client.chat([{"role": "user", "content": "hi"}], max_tokens=7))

    assert "".join(text for _, text in parts) == "Hello"
    assert {request_id for request_id, _ in parts} == {"chatcmpl-1"}
    body = json.loads(requests[-1].content)
    assert (body["model"], body["max_tokens"], body["stream"]) == ("demo", 7, True)


def test_a_chunk_without_choices_is_no_text() -> None:
    stream = chunk(content="a") + 'data: {"id": "chatcmpl-1", "choices": [], "usage": {}}\n\n'
    with client_of(chat_router(stream)) as client:
        assert [text for _, text in client.chat([], max_tokens=1)] == ["a"]


def test_an_error_within_the_stream_is_raised() -> None:
    stream = chunk(content="a") + 'data: {"error": {"message": "decode node lost"}}\n\n'
    with client_of(chat_router(stream)) as client, pytest.raises(KVRelayError, match="decode node lost"):
        list(client.chat([], max_tokens=1))


def test_a_refusal_is_raised_in_the_router_s_words() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        return httpx.Response(429, json={"error": {"message": "the queue is full"}})

    with client_of(handler) as client, pytest.raises(KVRelayError, match="the queue is full"):
        list(client.chat([], max_tokens=1))


def test_a_restart_of_all_nodes_says_which_are_missing() -> None:
    status = {"nodes": [], "missing_nodes": [{"name": "d1", "role": "decode"}]}
    said: list[str] = []
    with client_of(lambda _: httpx.Response(200, json=status)) as client:
        restart(client, [], timeout_s=1.0, say=said.append)
    assert said == ["left out, since not registered: d1"]


def test_a_reset_of_the_prefix_caches_names_each_node() -> None:
    nodes = [{"name": "p0", "state": "reset", "blocks": 7}, {"name": "d0", "state": "no_answer", "blocks": 0}]
    said: list[str] = []
    with client_of(lambda _: httpx.Response(200, json={"status": "reset", "nodes": nodes[:1]})) as client:
        reset_prefix_cache(client, say=said.append)
    assert said == ["p0 reset, 7 blocks"]
    partly = httpx.Response(503, json={"error": {"message": "not reset: d0"}, "nodes": nodes})
    with client_of(lambda _: partly) as client, pytest.raises(KVRelayError, match="not all prefix caches are reset"):
        reset_prefix_cache(client, say=said.append)
    assert said[1:] == ["d0 no answer, 0 blocks", "p0 reset, 7 blocks"]
    with client_of(lambda _: httpx.Response(502, text="<html>")) as client, pytest.raises(KVRelayError, match="502"):
        reset_prefix_cache(client, say=said.append)


def test_nobody_there() -> None:
    with client_of(refused) as client, pytest.raises(ClusterUnreachableError, match="no answer from http://router"):
        client.status()


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(404, text="<html>"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
    ],
    ids=["a web server", "another API", "a page for everything", "a list"],
)
def test_something_else_is_there(response: httpx.Response) -> None:
    with client_of(lambda _: response) as client:
        for ask in (client.status, lambda: list(client.chat([], max_tokens=1))):
            with pytest.raises(ClusterUnreachableError, match="at http://router is not a kvrelay router: it has no /"):
                ask()


def test_what_a_server_says_of_its_nodes_is_no_command_for_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"name": "d0\x1b[2J", "state": "reset", "blocks": 3}
    monkeypatch.setattr(ClusterClient, "reset_prefix_cache", lambda _: [node])
    app(["reset-prefix-cache"], standalone_mode=False)
    assert capsys.readouterr().out == "d0\\x1b[2J reset, 3 blocks\n"
