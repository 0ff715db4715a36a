from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from fake_nodes import config
from instant_router import InstantRouter
from starlette.types import Message, Receive, Scope, Send

from kvrelay.runtime.logging import LineFormatter
from router.http.access_log import AccessLog

HI = [{"role": "user", "content": "hi"}]


class Ticks:
    """A clock that is a quarter of a second on each time it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        self.now_s += 0.25
        return self.now_s


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("http request ")]


@pytest.fixture
def router(caplog: pytest.LogCaptureFixture) -> InstantRouter:
    caplog.set_level(logging.INFO)
    router = InstantRouter(max_body_bytes=4096)
    router.app = AccessLog(router.app, Ticks().now)
    return router


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_are_logged_with_their_tokens(
    router: InstantRouter, caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    body = {"prompt": ["abc", "de"], "max_tokens": 3, "stream": streaming}
    router.post("/v1/completions", body, headers={"X-Request-Id": "mine"})
    assert lines(caplog) == [
        "http request method=POST path=/v1/completions status=200 duration_s=0.25 request_id=mine "
        "prompt_tokens=5 completion_tokens=6 client=127.0.0.1"
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", {}, 400),
        ("POST", "/v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("POST", "/v1/completions", {"prompt": "a" * 5000}, 413),
        ("POST", "/v1/chat/completions", {"messages": HI, "tools": [1]}, 400),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/tokenize", {"prompt": "a"}, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/v1/models", None, 200),
    ],
)
def test_refused_requests_are_logged_too(
    router: InstantRouter, caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any, status: int
) -> None:
    response = router.request(method, path, json=body)
    assert response.status_code == status
    (line,) = lines(caplog)
    assert line.startswith(f"http request method={method} path={path} status={status} duration_s=0.25")
    given = response.headers.get("x-request-id")
    assert (f" request_id={given}" in line) if given else ("request_id" not in line)


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/readyz", "/metrics", "/cluster", "/cluster/requests", "/cluster/requests/x"]
)
def test_probes_are_logged_for_debugging_only(
    router: InstantRouter, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    router.request("GET", path)
    assert not lines(caplog)
    caplog.set_level(logging.DEBUG)
    router.request("GET", path)
    assert len(lines(caplog)) == 1


def test_who_cancels_is_logged(router: InstantRouter, caplog: pytest.LogCaptureFixture) -> None:
    router.request("DELETE", "/cluster/requests/x")
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_let_in_is_logged_at_every_path(caplog: pytest.LogCaptureFixture, status: int) -> None:
    caplog.set_level(logging.INFO)

    async def refuse(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        transport = httpx.ASGITransport(AccessLog(refuse, lambda: 0.0))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            await client.get("/cluster")

    asyncio.run(scenario())
    (line,) = lines(caplog)
    assert f"path=/cluster status={status}" in line


def test_a_path_cannot_forge_a_line_and_is_cut(router: InstantRouter, caplog: pytest.LogCaptureFixture) -> None:
    router.request("GET", "/x%0A2026 ERROR forged status=200" + "y" * 1000)
    (record,) = (record for record in caplog.records if record.name == "kvrelay")
    line = LineFormatter("router").format(record)
    assert "\n" not in line
    assert len(line) < 500
    assert re.search(r'path="/x\\\\?n2026 ERROR forged status=200y+\.\.\." status=404', line), line


@pytest.mark.parametrize(("begun", "said"), [(False, "status=499"), (True, "status=200")])
def test_a_client_that_leaves_is_logged(caplog: pytest.LogCaptureFixture, begun: bool, said: str) -> None:
    caplog.set_level(logging.INFO)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "client": None}
    asyncio.run(AccessLog(app, Ticks().now)(scope, receive, send))
    assert lines(caplog) == [f"http request method=POST path=/v1/completions {said} duration_s=0.25 client_left=True"]


def test_a_broken_endpoint_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    router = InstantRouter()

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    router.service.submit = broken  # type: ignore[method-assign,assignment]
    router.app = AccessLog(router.app, Ticks().now)
    caplog.set_level(logging.INFO)
    assert router.post("/v1/completions", {"prompt": "a"}).status_code == 500
    assert "status=500" in lines(caplog)[0]


def test_the_router_has_an_access_log_unless_told_otherwise() -> None:
    assert config().router.access_log
    assert not config(access_log=False).router.access_log
