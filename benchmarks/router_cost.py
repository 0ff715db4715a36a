"""What the router's own code costs per small request and per chunk: no sockets, no other process.

    python benchmarks/router_cost.py [--seconds 8]

The router's HTTP protocol, application, service and machine run on uvloop as in a router. In place of sockets there are
transports that count what is written: a client asks again when it has its answer, and a node answers what it is sent,
encoded and decoded as between processes. What is missing are system calls: about 15 us for each write.

CPU time is measured in windows of 0.08 s. Neighbours make a window dearer and never cheaper, so the least of many
hardly depends on them. ``together``: 16 requests that come at once, from the first byte until one has been sent to its
node (mean and last of the 16), and from the first answer of the node until one has been written to its client; the mean
of the best tenth of all rounds, and the median.

To compare two versions, set PYTHONPATH to one checkout and the other in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast
from unittest import mock

import uvicorn
import uvloop
from rich.console import Console

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Received
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import NodeId, RequestId, peer_id
from kvrelay.protocol.messages.base import Heartbeat, Load, Message
from kvrelay.protocol.messages.node_to_router import Register, RequestOutput, TokensOut
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.protocol.request import FinishReason
from kvrelay.runtime.gc_tuning import tune_gc
from router.http.app import make_app
from router.http.protocol import HttpProtocol
from router.http.server import http_limits, http_server
from router.http.state import state_routes
from router.metrics import Metrics
from router.model import load_model
from router.service import RouterService

sys.path.append(str(Path(__file__).parent))
from support.router_node import GEOMETRY, LETTERS

WINDOW_S = 0.08
CONNECTIONS = 64
TOGETHER = 16
STREAM_TOKENS = 256


def request(max_tokens: int, *, stream: bool) -> bytes:
    """One HTTP request, as ``support/router_client.py`` writes it."""
    fields = {"model": "demo", "prompt": "Hello", "max_tokens": max_tokens, "seed": 0, "stream": stream}
    body = json.dumps({**fields, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


class Node:
    """The router's transport and the only node behind it. ``take`` is called with each request that it is sent."""

    PEER = peer_id(NodeId("m0"), "a")

    def __init__(self, deliver: Callable[[object], None]) -> None:
        self._deliver = deliver
        self.take: Callable[[RequestId, int], None] = lambda request_id, epoch: None

    def bind(self, *addresses: str) -> list[str]:
        """Register the node."""
        self.say(
            Register(
                node_id=NodeId("m0"), incarnation="a", role="mixed", address="tcp://127.0.0.1:1", pid=1, model="demo",
                max_model_len=1 << 20, max_num_seqs=1 << 12, num_blocks=1 << 20, geometry=GEOMETRY,
            )
        )  # fmt: skip
        self.say(Heartbeat(load=Load(free_blocks=1 << 20)))
        return list(addresses)

    def say(self, message: Message) -> None:
        """Send ``message`` to the router."""
        self.say_encoded(encode(message))

    def say_encoded(self, encoded: bytes) -> None:
        """Send a message to the router."""
        self._deliver(Received(self.PEER, decode(encoded), (), encoded))

    def send(self, peer: str, message: Message) -> None:
        """Take what the router sends."""
        encode(message)
        if isinstance(message, Generate):
            self.take(message.request.request_id, message.request.epoch)

    def close(self) -> None:
        """Nothing to close."""


class Client(asyncio.Transport):
    """A connection of a client, as the router's protocol sees it. ``on_write`` is called with what it is sent."""

    def __init__(self, connect: Callable[[], HttpProtocol], on_write: Callable[[Client, bytes], None]) -> None:
        super().__init__({"socket": socket.socket()})
        self._on_write = on_write
        self.protocol = connect()
        self.protocol.connection_made(self)

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._on_write(self, bytes(data))


class Bench:
    """A router without sockets. Each measurement has connections of its own, which stay silent afterwards."""

    def __init__(self, connect: Callable[[], HttpProtocol], node: Node, seconds: float) -> None:
        self._connect = connect
        self._node = node
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._not_router_s = 0.0
        self._is_over = False

    async def requests(self) -> list[float]:
        """Return the CPU time of a request in microseconds, for each window."""

        def answer(request_id: RequestId, epoch: int) -> None:
            self._loop.call_soon(self._node.say, output(request_id, epoch, 0, FinishReason.LENGTH))

        def written(client: Client, data: bytes) -> None:
            assert b"200 OK" in data and b'"text":"a"' in data, data
            self._count += 1
            if not self._is_over:
                self._loop.call_soon(client.protocol.data_received, asked)

        asked = request(1, stream=False)
        self._node.take = answer
        self._begin(CONNECTIONS, written, asked)
        return await self._windows()

    async def chunks(self) -> list[float]:
        """Return the CPU time of a chunk in microseconds, for each window: all streams have a token per step."""
        streams: dict[tuple[RequestId, int], int] = {}

        def step() -> None:
            began_s = time.thread_time()
            outputs = []
            for key, index in list(streams.items()):
                is_last = index + 1 == STREAM_TOKENS
                outputs.append(output(*key, index, FinishReason.LENGTH if is_last else None).outputs[0])
                streams[key] += 1
                if is_last:
                    del streams[key]
            encoded = encode(TokensOut(outputs=outputs))
            self._not_router_s += time.thread_time() - began_s
            if outputs:
                self._node.say_encoded(encoded)
            if not self._is_over:
                self._loop.call_later(0.0, self._loop.call_later, 0.0, step)

        def written(client: Client, data: bytes) -> None:
            self._count += data.count(b'"text":"')
            if b"[DONE]" in data and not self._is_over:
                self._loop.call_soon(client.protocol.data_received, asked)

        asked = request(STREAM_TOKENS, stream=True)
        self._node.take = lambda request_id, epoch: streams.update({(request_id, epoch): 0})
        self._begin(CONNECTIONS, written, asked)
        self._loop.call_later(0.01, step)
        return await self._windows()

    async def together(self) -> list[list[float]]:
        """Return for each time in microseconds when each of some requests was sent on, and when it was answered."""
        sent: list[tuple[RequestId, int]] = []
        times_s: list[float] = []
        done = asyncio.Event()

        def take(request_id: RequestId, epoch: int) -> None:
            times_s.append(time.perf_counter())
            sent.append((request_id, epoch))
            if len(sent) == TOGETHER:
                self._loop.call_later(0.002, answer)

        def answer() -> None:
            said = [encode(output(*key, 0, FinishReason.LENGTH)) for key in sent]
            times_s.append(time.perf_counter())
            for encoded in said:
                self._node.say_encoded(encoded)

        def written(client: Client, data: bytes) -> None:
            times_s.append(time.perf_counter())
            if len(times_s) == 2 + 2 * TOGETHER:
                done.set()

        def ask() -> None:
            sent.clear()
            times_s[:] = [time.perf_counter()]
            done.clear()
            for client in clients:
                client.protocol.data_received(asked)

        asked = request(1, stream=False)
        self._node.take = take
        clients = [Client(self._connect, written) for _ in range(TOGETHER)]
        found: list[list[float]] = []
        until_s = time.monotonic() + self._seconds
        while time.monotonic() < until_s:
            self._loop.call_later(0.002, ask)
            await done.wait()
            done.clear()
            came_s, *sent_s = times_s[: 1 + TOGETHER]
            said_s, *written_s = times_s[1 + TOGETHER :]
            gone = [(at_s - came_s) * 1e6 for at_s in sent_s]
            answered = [(at_s - said_s) * 1e6 for at_s in written_s]
            found.append([statistics.mean(gone), gone[-1], statistics.mean(answered), answered[-1]])
        return found

    def _begin(self, connections: int, written: Callable[[Client, bytes], None], asked: bytes) -> None:
        self._is_over = False
        for _ in range(connections):
            client = Client(self._connect, written)
            self._loop.call_soon(client.protocol.data_received, asked)

    async def _windows(self) -> list[float]:
        found: list[float] = []
        await asyncio.sleep(0.5)
        until_s = time.monotonic() + self._seconds
        while time.monotonic() < until_s:
            self._count, self._not_router_s, began_s = 0, 0.0, time.thread_time()
            await asyncio.sleep(WINDOW_S)
            found.append((time.thread_time() - began_s - self._not_router_s) / max(1, self._count) * 1e6)
        self._is_over = True
        await asyncio.sleep(0.2)
        return found


def output(request_id: RequestId, epoch: int, index: int, finish_reason: FinishReason | None) -> TokensOut:
    """The node's message with one token of one request."""
    token = RequestOutput(
        request_id=request_id, epoch=epoch, index=index, token_ids=[LETTERS[index % 26]], finish_reason=finish_reason
    )
    return TokensOut(outputs=[token])


class NoClients:
    """The router serves no connections of its own."""

    async def finish(self) -> None:
        """All have ended."""


async def run(seconds: float, folder: str, console: Console) -> None:
    config = ClusterConfig.from_data(
        {
            "model": {"path": "nowhere", "served_name": "demo", "max_model_len": 4096},
            "router": {"max_queued_requests": 4096, "access_log": False},
            "engine": {"kind": "fake", "fake": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}},
            "security": {"insecure": True},
            "recording": {"directory": folder},
            "nodes": [{"name": "m0", "role": "mixed", "port": 1}],
        }
    )
    nodes: list[Node] = []

    def open_node(me: str, deliver: Callable[[object], None], *_: object, **__: object) -> Node:
        nodes.append(Node(deliver))
        return nodes[0]

    service = RouterService(config, load_model(config), Clock())
    metrics = Metrics(service.machine, service.clock.now)
    app = make_app(service, metrics, state_routes(service, metrics))
    server = http_server(app, "127.0.0.1", 0, http_limits(config.router))
    server.config.load()
    state = uvicorn.server.ServerState()
    kind = cast(Callable[..., HttpProtocol], server.config.http_protocol_class)
    connect = partial(kind, config=server.config, server_state=state, app_state={})
    with mock.patch("router.service.open_transport", open_node):
        running = asyncio.create_task(service.run(NoClients()))
        await asyncio.sleep(0.1)
    tune_gc()
    bench = Bench(connect, nodes[0], seconds)
    for name, windows in (("request", await bench.requests()), ("chunk", await bench.chunks())):
        console.print(f"{name}: least {min(windows):.1f} us, median {statistics.median(windows):.1f} us of CPU time")
    names = ("sent on, mean", "sent on, last", "answered, mean", "answered, last")
    for name, times in zip(names, zip(*await bench.together(), strict=True), strict=True):
        console.print(f"{TOGETHER} together, {name}: {_least(times):.0f} us, median {statistics.median(times):.0f} us")
    service.stop()
    service.stop()
    await running


def _least(values: Sequence[float]) -> float:
    """The mean of the best tenth."""
    return statistics.mean(sorted(values)[: max(1, len(values) // 10)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each of three measurements")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(run(options.seconds, folder, Console(width=120)))


if __name__ == "__main__":
    main()
