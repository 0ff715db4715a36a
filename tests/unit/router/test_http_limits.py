"""What a client may send and how long it may take, byte by byte on real connections."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_nodes import ANSWER, FakeCluster, Script, fake_cluster, until

from router.http import protocol
from router.http.body import read_body
from router.http.protocol import MAX_PIPELINED
from router.preparation import INLINE_BYTES, Job, Outcome

COMPLETIONS = "/v1/completions"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What a client that has ended its side is asked with, once a second at first: how often depends on the machine."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give refused clients more time to send the rest and to read: this machine may stand still for a second."""
    monkeypatch.setattr(protocol, "LINGER_S", 60.0)


def run(scenario: Callable[[FakeCluster], Awaitable[None]], script: Script | None = None, **router: object) -> None:
    """Run ``scenario`` against a cluster; afterwards nothing may be left of any request."""

    async def with_cluster() -> None:
        async with fake_cluster(script or Script(), "prefill decode", **router) as cluster:
            await scenario(cluster)
            await cluster.quiet()

    asyncio.run(with_cluster())


@asynccontextmanager
async def connected(cluster: FakeCluster) -> AsyncIterator[Connection]:
    url = httpx.URL(cluster.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # at once, also if the router never reads the rest


def post(body: bytes, *headers: bytes, path: str = COMPLETIONS, version: str = "1.1") -> bytes:
    head = [f"POST {path} HTTP/{version}".encode(), b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"", body])


def completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 5, "seed": 0, **fields}).encode()


async def answer_to(cluster: FakeCluster, request: bytes) -> tuple[bytes, bytes, bytes]:
    """Return status line, headers and the rest of what comes until the router closes the connection."""
    async with connected(cluster) as (reader, writer):
        writer.write(request)
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        status, _, headers = head.partition(b"\r\n")
        return status, headers, rest


def code(body: bytes) -> str:
    error: dict[str, str] = json.loads(body)["error"]
    return error["code"]


# ---------------------------------------------------------------- headers

BIG = b"x" * (1 << 20)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\na: " + BIG * 8,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 500_000,
        b"GET /" + BIG * 2,
        b"GET /health HTTP/1.1\r\n" + BIG,
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n" + b"a: b\r\n" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;" + BIG,
    ],
    ids=["one long", "many", "target", "name", "trailers", "chunk extension"],
)
def test_headers_that_are_too_long_are_431(request_bytes: bytes) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        status, headers, body = await answer_to(cluster, request_bytes)
        assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
        assert b"connection: close" in headers
        assert code(body) == "headers_too_large"
        assert "65536 bytes" in json.loads(body)["error"]["message"]

    run(scenario)


def test_limit_of_headers_holds_for_each_request_of_a_connection() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        headers = {"x-long": "x" * 700}
        for _ in range(4):
            assert (await cluster.client.get("/health", headers=headers)).status_code == 200
        body = completion(prompt="a" * 300)
        pipelined = post(body, b"x-long: " + b"y" * 700) * 5 + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n"
        _, _, rest = await answer_to(cluster, pipelined)
        assert rest.count(b"HTTP/1.1 200 OK") == 5
        assert (await cluster.client.get("/health", headers={"x-long": "x" * 1100})).status_code == 431

    run(scenario, max_header_bytes=1024)


def test_what_is_no_http_is_400_in_the_form_of_all_errors() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        status, _, body = await answer_to(cluster, b"\x16\x03\x01 hello\r\n\r\n")
        assert status == b"HTTP/1.1 400 Bad Request"
        assert code(body) == "invalid_http"

    run(scenario)


def test_what_is_no_http_is_logged_once_a_minute_for_each_client(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for request in (b"\x16\x03\x01 hello\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
            status, _, _ = await answer_to(cluster, request)
            assert status == b"HTTP/1.1 400 Bad Request"
        upgrade = b"GET /health HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n\r\n"
        await answer_to(cluster, upgrade)

    run(scenario)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "invalid HTTP from 127.0.0.1"
    ]


AMBIGUOUS = {
    "both lengths": b"content-length: 4\r\ntransfer-encoding: chunked",
    "two lengths": b"content-length: 4\r\ncontent-length: 40",
    "list of lengths": b"content-length: 4, 40",
    "negative length": b"content-length: -4",
    "signed length": b"content-length: +4",
    "length in hex": b"content-length: 0x4",
    "coding before chunked": b"transfer-encoding: chunked, identity",
    "unknown coding": b"transfer-encoding: xchunked",
    "space before the colon": b"transfer-encoding : chunked",
    "folded line": b"transfer-encoding:\r\n chunked",
    "bare carriage return": b"a: b\rtransfer-encoding: chunked",
}


@pytest.mark.parametrize("framing", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_request_whose_end_is_not_certain_is_refused_and_hides_no_other(framing: bytes) -> None:
    hidden = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"

    async def scenario(cluster: FakeCluster) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + framing + b"\r\n\r\n"
        status, _, rest = await answer_to(cluster, head + b"0\r\n\r\n" + hidden)
        assert status == b"HTTP/1.1 400 Bad Request"
        assert rest.count(b"HTTP/1.1") == 0

    run(scenario)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(
    "begin",
    [
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        post(b"{")[:-1],
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{",
        b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"GET /health HTTP/1.1\r\n\r\nGET /hea",
    ],
    ids=["first byte", "headers", "no body", "body", "chunks", "second request"],
)
def test_request_that_does_not_come_to_its_end_is_408(begin: bytes) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(begin)
            answer = await reader.read()
        _, status, rest = answer.rpartition(b"HTTP/1.1 408 Request Timeout\r\n")
        assert status, answer
        assert code(rest.partition(b"\r\n\r\n")[2]) == "request_timeout"

    run(scenario, request_read_timeout_s=0.2)


def test_request_that_is_late_is_answered_in_the_form_of_its_api() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(b"POST /v1/messages HTTP/1.1\r\ncontent-length: 100\r\n\r\n{")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["type"] == "error"

    run(scenario, request_read_timeout_s=0.2)


@pytest.mark.parametrize("streaming", [False, True])
def test_garbage_behind_requests_that_are_being_answered_ends_the_connection(
    streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bad = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"

    async def scenario(cluster: FakeCluster) -> None:
        slow = post(completion(max_tokens=10, stream=streaming))
        for requests in (slow, slow + slow):
            async with connected(cluster) as (reader, writer):
                writer.write(requests + bad)
                assert b" 400 " not in await reader.read()
        await until(lambda: not cluster.http.server_state.tasks)

    run(scenario, Script(pace_s=0.01))
    assert "Exception" not in caplog.text


def test_client_that_sends_many_requests_without_waiting_for_answers_is_disconnected() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(post(completion(max_tokens=1000)) * (MAX_PIPELINED + 1))
            assert await reader.read() == b""
        await until(lambda: not cluster.http.server_state.tasks)

    run(scenario, Script(pace_s=0.01))


def test_client_that_waits_to_be_asked_and_sends_garbage_is_refused_once(caplog: pytest.LogCaptureFixture) -> None:
    begin = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"

    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(begin + b"zz\r\n")
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        await until(lambda: not cluster.http.server_state.tasks)

    run(scenario)
    assert "error while serving" not in caplog.text


def test_trickle_is_408() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n")
            answer = asyncio.ensure_future(reader.read())
            while not answer.done():
                writer.write(b" ")
                await asyncio.wait([answer], timeout=0.01)
            assert answer.result().startswith(b"HTTP/1.1 408 ")

    run(scenario, request_read_timeout_s=0.2)


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\n\r\n", b"\r\n"], ids=["new", "used", "line break"])
def test_idle_connection_is_closed(begin: bytes) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(begin)
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200") if b"GET" in begin else answer == b""

    run(scenario, keep_alive_timeout_s=0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_may_take_longer_than_a_request(streaming: bool) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        body = {"prompt": "a", "max_tokens": 80, "stream": streaming}
        response = await cluster.client.post(COMPLETIONS, json=body)
        assert response.status_code == 200
        assert (
            response.text.endswith("[DONE]\n\n") if streaming else response.json()["usage"]["completion_tokens"] == 80
        )

    run(scenario, Script(pace_s=0.01), request_read_timeout_s=0.5, keep_alive_timeout_s=0.5)


def test_request_behind_one_that_takes_long_is_not_late() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        slow = post(completion(max_tokens=40))
        long = post(completion(prompt="a" * 200_000), b"connection: close")
        _, _, rest = await answer_to(cluster, slow + long)
        assert b"HTTP/1.1 400 Bad Request" in rest

    run(scenario, Script(pace_s=0.01), request_read_timeout_s=0.1)


def test_a_request_is_not_late_whose_deadline_comes_when_it_is_read_again() -> None:
    """Before, it was 408: the router had not read on for most of the time."""

    async def scenario(cluster: FakeCluster) -> None:
        slow = post(completion(max_tokens=40))
        long = post(completion(prompt="a" * 200_000), b"connection: close")
        async with connected(cluster) as (reader, writer):
            writer.write(slow + long[:-1])
            await until(lambda: any(connection.flow.read_paused for connection in cluster.connections))
            [connection] = cluster.connections
            await until(lambda: not connection.flow.read_paused)
            assert connection._deadline is not None
            connection._deadline.cancel()
            connection._overdue()
            writer.write(long[-1:])
            assert b"HTTP/1.1 400 Bad Request" in await reader.read()

    run(scenario, Script(pace_s=0.001))


# ---------------------------------------------------------------- clients that end their side


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("streaming", [False, True])
def test_half_closed_client_gets_its_answer(streaming: bool, version: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(post(completion(stream=streaming), version=version))
            writer.write_eof()
            answer = (await reader.read()).replace(CONTINUE, b"")
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert (
            answer.endswith(b"[DONE]\n\n" if version == "1.0" else b"0\r\n\r\n") if streaming else b'"usage"' in answer
        )

    run(scenario, Script(pace_s=0.01))


def test_half_closed_client_is_asked_and_waits() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(post(completion(max_tokens=200)))
            writer.write_eof()
            answer = await reader.read()
        assert answer.startswith(CONTINUE)
        assert answer.replace(CONTINUE, b"").startswith(b"HTTP/1.1 200 OK")

    run(scenario, Script(pace_s=0.01))


def bodies_being_read() -> list[bytearray]:
    """Return what is there of each body that is not complete, from the coroutines that wait for the rest."""
    found = []
    for task in asyncio.all_tasks():
        coroutine: Any = task.get_coro()
        while coroutine is not None:
            if getattr(coroutine, "cr_code", None) is read_body.__code__ and coroutine.cr_frame is not None:
                found.append(coroutine.cr_frame.f_locals["body"])
            coroutine = getattr(coroutine, "cr_await", None)
    return found


@pytest.mark.parametrize("num_bytes", [100, 300_000])
def test_slow_body_of_a_client_that_leaves_is_forgotten(num_bytes: int) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (_, writer):
            writer.write(post(b"x" * (num_bytes + 1))[:-1])
            await until(lambda: [len(body) for body in bodies_being_read()] == [num_bytes])
            assert cluster.service.body_memory.num_bytes == (num_bytes if num_bytes > INLINE_BYTES else 0)
            [connection] = map(weakref.ref, cluster.connections)
        await until(lambda: not cluster.connections)
        await until(lambda: not cluster.http.server_state.tasks)
        assert not bodies_being_read()
        assert cluster.service.body_memory.num_bytes == 0
        for _ in range(10):  # what the loop still has to call refers to the connection
            await asyncio.sleep(0)
        gc.collect()
        assert connection() is None

    run(scenario)


@pytest.mark.parametrize("num_behind", [0, 3], ids=["alone", "others behind it"])
@pytest.mark.parametrize("body", [completion(), completion(stream=True)], ids=["whole", "stream"])
def test_what_a_closed_connection_held_is_free_at_once(body: bytes, num_behind: int) -> None:
    """Without the cyclic garbage collector, which runs rarely and then delays all streams."""

    async def scenario(cluster: FakeCluster) -> None:
        gc.disable()
        try:
            async with connected(cluster) as (reader, writer):
                writer.write(post(body) + post(completion(max_tokens=1000)) * num_behind)
                await reader.readuntil(b"[DONE]" if b"stream" in body else b"usage")
                [connection] = map(weakref.ref, cluster.connections)
            await until(lambda: not cluster.connections and not cluster.http.server_state.tasks)
            for _ in range(10):  # what the loop still has to call refers to the connection
                await asyncio.sleep(0)
            assert connection() is None
        finally:
            gc.enable()

    run(scenario)


# ---------------------------------------------------------------- memory for bodies

KIB = 1 << 10
TIGHT = {"max_body_bytes": 256 * KIB, "max_total_body_bytes": 512 * KIB}


@asynccontextmanager
async def stalled(cluster: FakeCluster, *lengths: int) -> AsyncIterator[list[Connection]]:
    """Have bodies of these lengths there, each without its last byte."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connected(cluster)) for _ in lengths]
        for length, (_, writer) in zip(lengths, connections, strict=True):
            writer.write(post(b" " * length)[:-1])
        await until(lambda: sorted(map(len, bodies_being_read())) == sorted(length - 1 for length in lengths))
        yield connections


def test_long_bodies_beyond_the_memory_for_them_are_503(caplog: pytest.LogCaptureFixture) -> None:
    long = completion(prompt="a" * 200 * KIB)

    async def scenario(cluster: FakeCluster) -> None:
        async with stalled(cluster, 200 * KIB, 200 * KIB):
            for _ in range(2):
                status, headers, body = await answer_to(cluster, post(long))
                assert status == b"HTTP/1.1 503 Service Unavailable"
                assert b"connection: close" in headers
                assert b"retry-after: 5" in headers
                assert code(body) == "too_many_long_bodies"
                assert "524288 bytes (router.max_total_body_bytes)" in json.loads(body)["error"]["message"]
            short = await cluster.client.post(COMPLETIONS, content=completion())
            assert short.json()["choices"][0]["text"] == ANSWER[:5]
        await until(lambda: not cluster.service.body_memory.num_bytes)
        assert (await cluster.client.post("/tokenize", content=long)).json()["count"] == 200 * KIB

    run(scenario, None, **TIGHT)
    assert caplog.text.count("too many long bodies") == 1


def test_clients_that_are_answered_503_can_read_it_while_they_send() -> None:
    """Were the connection closed at once, what they send would reset it, and the answer with it."""

    async def scenario(cluster: FakeCluster) -> None:
        async with stalled(cluster, 250 * KIB, 250 * KIB), connected(cluster) as (reader, writer):
            writer.write(post(b" " * 256 * KIB)[: -100 * KIB])
            await until(lambda: len(bodies_being_read()) == 2)
            for _ in range(99):
                writer.write(b" " * KIB)
                await writer.drain()
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")

    run(scenario, None, **TIGHT)


def test_bodies_count_until_they_are_prompts() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        prepare, go_on = cluster.service.preparer.prepare_in_worker, asyncio.Event()

        async def prepare_later(job: Job) -> Outcome:
            await go_on.wait()
            return await prepare(job)

        cluster.service.preparer.prepare_in_worker = prepare_later  # type: ignore[method-assign]
        content = completion(prompt="a" * 200 * KIB)
        asked = [asyncio.create_task(cluster.client.post("/tokenize", content=content)) for _ in range(2)]
        await until(lambda: cluster.service.body_memory.num_bytes == 2 * len(content))
        assert (await cluster.client.post("/tokenize", content=content)).status_code == 503
        go_on.set()
        assert [(await answer).status_code for answer in asked] == [200, 200]
        assert cluster.service.body_memory.num_bytes == 0

    run(scenario, None, **TIGHT)


def test_half_a_request_of_a_client_that_leaves_is_forgotten() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            writer.write(post(completion())[:-3])
            writer.write_eof()
            assert await reader.read() == b""

    run(scenario)


# ---------------------------------------------------------------- HTTP/1.0


def test_streams_of_http_1_0_have_no_chunks() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        status, headers, rest = await answer_to(cluster, post(completion(stream=True), version="1.0"))
        assert status == b"HTTP/1.1 200 OK"
        assert b"transfer-encoding" not in headers
        events = rest.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events[:-2]]
        assert "".join(texts) == ANSWER[:5]
        status, headers, rest = await answer_to(cluster, post(completion(), version="1.0"))
        assert f"content-length: {len(rest)}".encode() in headers
        assert json.loads(rest)["choices"][0]["text"] == ANSWER[:5]

    run(scenario)


# ---------------------------------------------------------------- encodings


async def send(cluster: FakeCluster, content: bytes, encoding: str, path: str = COMPLETIONS) -> httpx.Response:
    return await cluster.client.post(path, content=content, headers={"content-encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "identity"])
def test_gzip_body(encoding: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        content = completion() if encoding == "identity" else gzip.compress(completion())
        response = await send(cluster, content, encoding)
        assert response.json()["choices"][0]["text"] == ANSWER[:5]

    run(scenario)


def test_long_gzip_body() -> None:
    content = gzip.compress(json.dumps({"prompt": "ab" * 100_000}).encode())
    assert len(content) < INLINE_BYTES

    async def scenario(cluster: FakeCluster) -> None:
        assert (await send(cluster, content, "gzip", "/tokenize")).json()["count"] == 200_000

    run(scenario)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "said"),
    [
        (gzip.compress(b" " * (17 << 20)), "gzip", 413, "16777216 bytes"),
        (gzip.compress(b" " * (400 << 20), 1), "gzip", 413, "16777216 bytes"),
        (completion(), "gzip", 400, "not gzip"),
        (gzip.compress(completion())[:-5], "gzip", 400, "one whole gzip member"),
        (gzip.compress(completion()) + b"more", "gzip", 400, "one whole gzip member"),
        (b"", "gzip", 400, "one whole gzip member"),
        (completion(), "br", 415, "'br' is not supported"),
        (completion(), "gzip, gzip", 415, "is not supported"),
        (completion(), "x" * 5000, 415, "is not supported"),
    ],
    ids=["too long", "bomb", "none", "cut off", "more behind", "empty", "brotli", "twice", "long name"],
)
def test_body_of_a_wrong_encoding(content: bytes, encoding: str, status: int, said: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await send(cluster, content, encoding)
        assert response.status_code == status
        assert said in response.json()["error"]["message"]

    run(scenario)


def test_body_that_is_announced_too_long_is_refused_before_it_comes() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with connected(cluster) as (reader, writer):
            head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 999999999999\r\n\r\n"
            writer.write(head)
            assert await reader.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"

    run(scenario)


# ---------------------------------------------------------------- web pages


def test_web_pages_may_not_use_the_api_unless_configured() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.get("/v1/models", headers={"origin": "http://page"})
        assert "access-control-allow-origin" not in response.headers

    run(scenario)


@pytest.mark.parametrize(("origins", "allowed"), [(["*"], "*"), (["http://page"], "http://page")])
def test_web_pages_of_configured_origins(origins: list[str], allowed: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        origin = {"origin": "http://page"}
        ask = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        asked = await cluster.client.options(COMPLETIONS, headers=ask)
        assert asked.status_code == 200
        response = await cluster.client.post(COMPLETIONS, content=completion(stream=True), headers=origin)
        for headers in (asked.headers, response.headers):
            assert headers["access-control-allow-origin"] == allowed
        assert response.text.endswith("data: [DONE]\n\n")
        stranger = await cluster.client.get("/v1/models", headers={"origin": "http://other"})
        assert stranger.headers.get("access-control-allow-origin") == ("*" if allowed == "*" else None)

    run(scenario, cors_allow_origins=origins)


# ---------------------------------------------------------------- ids and paths


@pytest.mark.parametrize("given", ["a b", "x" * 129, "é", "{}/\\\"'<>", "🦊", "x" * 5000, ""])
def test_request_id_of_unusual_characters(given: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        headers = [(b"x-request-id", given.encode())]
        response = await cluster.client.post(COMPLETIONS, content=completion(), headers=headers)
        assert response.status_code == 200
        echoed = dict(response.headers.raw)[b"x-request-id"]
        assert echoed == given.encode() if 0 < len(given.encode()) <= 1024 else len(echoed) == 32
        assert response.json()["id"].removeprefix("cmpl-").isalnum()

    run(scenario)


@pytest.mark.parametrize("count", [1, 3])
def test_request_id_in_progress_is_replaced(count: int) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        content, headers = completion(max_tokens=100, n=count), {"X-Request-Id": "twice"}
        first = asyncio.create_task(cluster.client.post(COMPLETIONS, content=content, headers=headers))
        await until(lambda: len(cluster.service.machine.requests) == count)
        second = await cluster.client.post(COMPLETIONS, content=content, headers=headers)
        answers = [second, await first]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert [answer.headers["x-request-id"] for answer in answers] == ["twice", "twice"]
        assert answers[0].json()["id"] != answers[1].json()["id"] == "cmpl-twice"
        again = await cluster.client.post(COMPLETIONS, content=completion(), headers=headers)
        assert again.json()["id"] == "cmpl-twice"

    run(scenario, Script(pace_s=0.002))


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/livez", "/ping", "/ready", "/readyz", "/v1/models", "/metrics"]
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_paths_with_and_without_a_slash(path: str, slash: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        assert (await cluster.client.get(path + slash)).status_code == 200
        response = await cluster.client.post(COMPLETIONS + slash, content=completion())
        assert response.json()["choices"][0]["text"] == ANSWER[:5]
        assert (await cluster.client.get(f"/v1/models/demo{slash}")).json()["id"] == "demo"

    run(scenario)


def test_root_and_double_slashes_are_404() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        for path in ("/", "//", "///nowhere//"):
            status, _, body = await answer_to(cluster, f"GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n".encode())
            assert status == b"HTTP/1.1 404 Not Found"
            assert code(body) == "not_found"

    run(scenario)
