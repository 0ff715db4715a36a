"""The client against servers that stream well, badly or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from kvrelay.bench.errors import BenchError
from kvrelay.bench.http import Client
from kvrelay.bench.loads import Conversation, Turn
from kvrelay.bench.runner import CHAT, Runner, Target
from kvrelay.bench.server import first_request, model_card, tokens_per_word
from kvrelay.bench.streams import RequestRecord, stream

T = TypeVar("T")
Request = tuple[str, dict[str, Any]]
"""The request line, and the body."""

Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def text_chunk(text: str) -> bytes:
    return event({"id": "cmpl-7", "choices": [{"index": 0, "text": text}], "usage": None})


USAGE = event({"id": "cmpl-7", "choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}})
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


class Server:
    """A server whose answers are those of ``handler``; counts connections."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.num_connections = 0
        self.requests: list[Request] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields["content-length"]))
                request = (head.split("\r\n")[0], json.loads(body or b"{}"))
                self.requests.append(request)
                await self._handler(request, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def play(self, scene: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Run ``scene`` with a client of this server."""

        async def run() -> T:
            server = await asyncio.start_server(self.on_client, "127.0.0.1", 0)
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            try:
                return await scene(client)
            finally:
                client.close()
                server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks)
                self._tasks.clear()

        return asyncio.run(run())


def sends(*parts: bytes) -> Handler:
    """Return a handler that writes ``parts``, each when the last has left."""

    async def handler(_: Request, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return handler


def ask(server: Server, texts: list[str] | None = None) -> RequestRecord:
    return server.play(lambda client: stream(client, "/v1/completions", {"prompt": "x"}, 3, texts))


def test_a_chunk_of_several_tokens_is_one_gap_and_tokens_are_those_of_usage() -> None:
    texts: list[str] = []
    chunks = [framed(text_chunk(text)) for text in ("one", "two three four", "")]
    record = ask(Server(sends(HEAD, *chunks, framed(USAGE), framed(DONE) + END)), texts)

    assert record.error is None
    assert texts == ["one", "two three four", ""]
    assert (record.prompt_tokens, record.output_tokens) == (11, 5)
    assert len(record.chunk_times_s) == 3
    assert record.answer_id == "cmpl-7"
    assert 0 < record.ttft_s <= record.e2e_s
    assert record.tpot_s == (record.e2e_s - record.ttft_s) / 4


def test_events_in_pieces_and_together_comments_and_crlf_are_read() -> None:
    whole = b": ping\r\n\r\n" + text_chunk("a").replace(b"\n", b"\r\n") + text_chunk("ü") + USAGE + DONE
    pieces = [whole[index : index + 7] for index in range(0, len(whole), 7)]
    record = ask(Server(sends(HEAD, *map(framed, pieces), END)))

    assert record.error is None
    assert len(record.chunk_times_s) == 2
    assert record.output_tokens == 5


def test_without_usage_tokens_are_chunks_and_the_record_says_so() -> None:
    record = ask(Server(sends(HEAD, framed(text_chunk("a") + text_chunk("b") + DONE) + END)))

    assert (record.output_tokens, record.prompt_tokens, record.has_usage) == (2, 3, False)


def test_a_refusal_is_an_error_with_the_servers_words() -> None:
    body = b'{"error": {"message": "max_tokens is too large", "code": 400}}'
    record = ask(Server(sends(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))))

    assert record.error == "status 400: max_tokens is too large"


def test_an_error_within_the_stream_is_an_error() -> None:
    failed = event({"error": {"message": "the node is lost"}})
    record = ask(Server(sends(HEAD, framed(text_chunk("a")), framed(failed) + framed(DONE) + END)))

    assert record.error == "the node is lost"


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([b"garbage\r\n\r\n"], "not HTTP"),
        ([HEAD, framed(DONE) + END], "no chunk with a choice"),
        ([HEAD, framed(b"data: {]\n\n") + END], "not of the OpenAI API"),
        ([b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 4\r\n\r\noops"], "status 502: oops"),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"], "status 503: Busy"),
    ],
)
def test_answers_that_are_none_are_errors(parts: list[bytes], error: str) -> None:
    record = ask(Server(sends(*parts)))

    assert error in str(record.error)


def test_a_connection_that_breaks_within_an_answer_is_an_error() -> None:
    async def handler(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + framed(text_chunk("a")))
        await writer.drain()
        writer.close()

    assert "closed the connection" in str(ask(Server(handler)).error)


def test_a_body_may_end_with_the_connection() -> None:
    async def handler(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + text_chunk("a") + USAGE + DONE)
        await writer.drain()
        writer.close()

    record = ask(Server(handler))
    assert (record.error, record.output_tokens) == (None, 5)


def test_connections_are_used_again_one_per_request_at_once() -> None:
    server = Server(sends(HEAD, framed(text_chunk("a") + USAGE + DONE) + END))

    async def scene(client: Client) -> None:
        for _ in range(3):
            await asyncio.gather(*(stream(client, "/v1/completions", {}, 1) for _ in range(4)))

    server.play(scene)
    assert len(server.requests) == 12
    assert server.num_connections == 4


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        Client(url)


# ---------------------------------------------------------------- conversations


def test_turns_of_a_chat_contain_the_answers_before_them_and_no_more_chats_run_than_allowed() -> None:
    running = most = 0

    async def handler(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        chunk = event({"choices": [{"delta": {"content": "answer"}}]})
        writer.write(HEAD + framed(chunk + USAGE + DONE) + END)
        await writer.drain()

    server = Server(handler)
    chat = Conversation((Turn("first", 1, 4), Turn("second", 1, 4)), system="system")

    async def scene(client: Client) -> list[RequestRecord]:
        runner = Runner(client, Target("m", CHAT, {"temperature": 0}), max_concurrency=2)
        return (await runner.run([chat] * 5, [0.0] * 5, lambda _: None)).records

    records = server.play(scene)
    assert [record.error for record in records] == [None] * 10
    assert most == 2
    roles = [[message["role"] for message in body["messages"]] for _, body in server.requests]
    assert sorted(map(len, roles)) == [2] * 5 + [4] * 5
    longest = max((body["messages"] for _, body in server.requests), key=len)
    assert [message["content"] for message in longest] == ["system", "first", "answer", "second"]
    assert server.requests[0][1]["temperature"] == 0


def test_a_chat_ends_with_a_request_that_fails() -> None:
    server = Server(sends(b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"))

    async def scene(client: Client) -> list[RequestRecord]:
        chat = Conversation((Turn("first", 1, 4), Turn("second", 1, 4)))
        return (await Runner(client, Target("m", CHAT)).run([chat], [0.0], lambda _: None)).records

    assert [record.error for record in server.play(scene)] == ["status 500: X"]


def test_a_request_that_takes_too_long_is_an_error() -> None:
    async def handler(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await asyncio.Event().wait()

    async def scene(client: Client) -> RequestRecord:
        return await Target("m", timeout_s=0.05).ask(client, "x", Turn("x", 1, 1))

    assert Server(handler).play(scene).error == "no whole answer within 0.05 s"


# ---------------------------------------------------------------- what a server says of itself


def _json(body: object, status: bytes = b"200 OK") -> Handler:
    data = json.dumps(body).encode()
    return sends(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data))


def test_the_model_is_the_one_named_or_the_first() -> None:
    server = Server(_json({"data": [{"id": "a"}, {"id": "b"}]}))

    assert server.play(lambda client: model_card(client, None))["id"] == "a"
    assert server.play(lambda client: model_card(client, "b"))["id"] == "b"
    with pytest.raises(BenchError, match=r"--model c: .* serves a, b"):
        server.play(lambda client: model_card(client, "c"))


@pytest.mark.parametrize("handler", [_json({"detail": "Not Found"}, b"404 Not Found"), _json([]), _json({"data": []})])
def test_a_server_without_models_is_refused(handler: Handler) -> None:
    with pytest.raises(BenchError, match="no list of models"):
        Server(handler).play(lambda client: model_card(client, None))


def test_a_server_that_is_not_there_is_named() -> None:
    async def scene() -> None:
        await model_card(Client("http://127.0.0.1:1"), None)

    with pytest.raises(BenchError, match="no answer from http"):
        asyncio.run(scene())


def test_tokens_per_word_are_measured_by_usage() -> None:
    server = Server(sends(HEAD, framed(text_chunk("a") + USAGE + DONE) + END))

    assert server.play(lambda client: tokens_per_word(client, Target("m"))) == 0.25  # 11 of 200 words; the least

    silent = Server(sends(HEAD, framed(text_chunk("a") + DONE) + END))
    with pytest.raises(BenchError, match="--tokenizer"):
        silent.play(lambda client: tokens_per_word(client, Target("m")))


def test_a_first_request_that_fails_ends_the_benchmark_with_the_servers_words() -> None:
    server = Server(_json({"error": {"message": "no such field"}}, b"400 Bad Request"))

    with pytest.raises(BenchError, match="status 400: no such field"):
        server.play(lambda client: first_request(client, Target("m", CHAT), Turn("x", 1, 1)))
    assert server.requests[0][1]["messages"] == [{"role": "user", "content": "x"}]
