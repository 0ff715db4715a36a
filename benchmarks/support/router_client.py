"""The load client of ``benchmarks/router_throughput.py``: keep-alive connections that ask over and over.

``python router_client.py PORT CONNECTIONS MAX_TOKENS PACE_US STREAM SECONDS`` prints lines of JSON: when the measured
time begins and each half second of it, the requests, chunks and tokens so far; and at its end those too, with
percentiles 1 to 99 of the latency of requests that ended in it. Tokens are counted as letters of ``text``. The first
connection of a stream compares the text of its answers with what the node said.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httptools
import uvloop

WARM_UP_S = 1.0
WINDOW_S = 0.5
_TEXT = re.compile(rb'"text":"([a-z]*)"')


@dataclass
class Load:
    """What is asked, and what came of it."""

    connections: int
    max_tokens: int
    pace_us: int
    stream: bool
    measuring: bool = False
    num_requests: int = 0
    num_chunks: int = 0
    num_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, object]:
        """What has come so far."""
        return {"requests": self.num_requests, "chunks": self.num_chunks, "tokens": self.num_tokens}

    @property
    def request(self) -> bytes:
        """One HTTP request."""
        body = json.dumps(
            {
                "model": "demo",
                "prompt": "Hello",
                "max_tokens": self.max_tokens,
                "seed": self.pace_us,
                "stream": self.stream,
                "ignore_eos": True,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        return head.encode() + b"content-type: application/json\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """Asks again whenever an answer is complete."""

    transport: asyncio.Transport

    def __init__(self, load: Load, *, checks: bool) -> None:
        self._load = load
        self._request = load.request
        self._checks = checks
        self._answer: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        load = self._load
        if load.measuring:
            texts = _TEXT.findall(body)
            load.num_chunks += len(texts)
            load.num_tokens += sum(map(len, texts))
        if self._checks:
            self._answer.append(body)

    def on_message_complete(self) -> None:
        load, status = self._load, self._parser.get_status_code()
        if status != 200:
            load.wrong.append(f"status {status}")
        if self._checks:
            self._check(b"".join(self._answer))
        if load.measuring:
            load.num_requests += 1
            load.latencies_s.append(time.perf_counter() - self._asked_s)
        self._ask()

    def _ask(self) -> None:
        self._answer.clear()
        self._asked_s = time.perf_counter()
        self.transport.write(self._request)

    def _check(self, answer: bytes) -> None:
        events = [json.loads(line[6:]) for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["text"] for event in events)
        expected = "".join(chr(97 + index % 26) for index in range(self._load.max_tokens))
        if text != expected:
            self._load.wrong.append(f"text {text[:80]!r}")


async def _run(port: int, load: Load, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    for index in range(load.connections):
        checks = load.stream and index == 0
        await loop.create_connection(partial(Connection, load, checks=checks), "127.0.0.1", port)
    await asyncio.sleep(WARM_UP_S)
    load.measuring, began_s = True, time.perf_counter()
    for window in range(round(seconds / WINDOW_S)):
        print(json.dumps(load.counts), flush=True)
        await asyncio.sleep(began_s + (window + 1) * WINDOW_S - time.perf_counter())
    load.measuring = False
    return time.perf_counter() - began_s


def _percentiles_ms(values_s: list[float]) -> list[float]:
    """Return percentiles 1 to 99; none of fewer than two values."""
    return [value * 1e3 for value in statistics.quantiles(values_s, n=100)] if len(values_s) > 1 else []


def main() -> None:
    port, connections, max_tokens, pace_us, stream = map(int, sys.argv[1:6])
    load = Load(connections, max_tokens, pace_us, bool(stream))
    took_s = uvloop.run(_run(port, load, float(sys.argv[6])))
    result = {
        **load.counts,
        "seconds": took_s,
        "latencies_ms": _percentiles_ms(load.latencies_s),
        "wrong": load.wrong[:3],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
