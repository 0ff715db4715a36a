"""A bare HTTP server that answers completions: the baselines' node in ``benchmarks/router_throughput.py``.

``python router_mock.py PORT``. A completion's pace is its seed, in microseconds per token, as in ``router_node.py``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import httptools
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n%s\r\n\r\n"
_STREAM_HEAD = _HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked")
_COMMON = b'"id":"cmpl-0","object":"text_completion","created":1,"model":"demo"'
_CHUNK = b'data: {%s,"choices":[{"index":0,"text":"%c","logprobs":null,"finish_reason":%s}]}\n\n'
_CHOICE = b'{%s,"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6},"choices":[{"index":0,"text":"a",'
_WHOLE = _CHOICE + b'"logprobs":null,"finish_reason":"length"}]}'
_FACTS: dict[str, object] = {
    "/v1/models": {"object": "list", "data": [{"id": "demo", "object": "model"}]},
    "/get_model_info": {"model_path": "demo", "is_generation": True},
    "/get_server_info": {"model_path": "demo", "served_model_name": "demo", "tp_size": 1, "dp_size": 1},
}


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._writable = asyncio.Event()
        self._writable.set()
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url.decode().partition("?")[0], b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._path != "/v1/completions":
            self._write_json(json.dumps(_FACTS.get(self._path, {"status": "ok"})).encode())
            return
        body = json.loads(self._body)
        loop = asyncio.get_running_loop()
        if body.get("stream"):
            self._task = loop.create_task(self._stream(body))
        else:
            loop.call_later(body["seed"] / 1e6, self._write_json, _WHOLE % _COMMON)

    def _write_json(self, content: bytes) -> None:
        self.transport.write(_HEAD % (b"application/json", b"content-length: %d" % len(content)) + content)

    async def _stream(self, body: dict[str, Any]) -> None:
        pace_s, count = body["seed"] / 1e6, body["max_tokens"]
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        self.transport.write(_STREAM_HEAD)
        for index in range(count):
            due_s += pace_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            await self._writable.wait()
            if self.transport.is_closing():
                return
            event = _CHUNK % (_COMMON, 97 + index % 26, b'"length"' if index + 1 == count else b"null")
            self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
