"""Cost of keys between processes (``security.keys``): the transport over tcp with and without them.

Two processes, each with a Transport. ``step messages``: ``TokensOut`` of 64 requests with a token each, as a decode
node sends once per step; every hundredth waits for an answer. ``KV frames``: messages with 1 MiB of payload, at most 64
not acknowledged. ``round trip``: one message and its answer at a time. Both alternate within each round. The figures
are medians of the rounds. Links shm and cuda send block ids only: their KV is not encrypted.

Usage: python benchmarks/keys.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from kvrelay.machine.contract import Received
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, Message
from kvrelay.protocol.messages.node_to_router import Drained, RequestOutput, TokensOut
from kvrelay.protocol.messages.router_to_node import Abort
from kvrelay.runtime.keys import Keys, make_keys
from kvrelay.runtime.transport import Transport

ROUTER, NODE = PeerId("router"), PeerId("d0#1")
STEP = TokensOut(
    outputs=[
        RequestOutput(request_id=RequestId(f"cmpl-{number:032x}"), epoch=1, index=100, token_ids=[1])
        for number in range(64)
    ]
)
FRAME_BYTES, WINDOW = 1 << 20, 64
NUM_STEPS, NUM_FRAMES, NUM_TRIPS = 5000, 1000, 2000


def serve(pipe: Connection, keys: Keys | None) -> None:
    """Answer: Abort to every message with payload, Heartbeat to Heartbeat and to Drained."""

    async def run() -> None:
        transport: Transport

        def deliver(event: object) -> None:
            if not isinstance(event, Received):
                return
            if event.payload:
                transport.send(event.peer, Abort(request_id=RequestId(""), epoch=0))
            elif isinstance(event.message, Heartbeat | Drained):
                transport.send(event.peer, Heartbeat())

        transport = Transport(ROUTER, deliver, send_queue=4000, keys=keys)
        pipe.send(transport.bind("tcp://127.0.0.1:0")[0])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        transport.close()

    uvloop.run(run())


class Client:
    """A node that sends to one server."""

    def __init__(self, address: str, keys: Keys | None) -> None:
        self._answers: asyncio.Queue[object] = asyncio.Queue()
        self._transport = Transport(NODE, self._answers.put_nowait, send_queue=20_000, keys=keys)
        self._transport.connect(ROUTER, address)

    async def steps(self) -> float:
        """Return step messages per second."""
        started_s = time.perf_counter()
        for number in range(NUM_STEPS):
            self._transport.send(ROUTER, STEP)
            if number % 100 == 99:
                await self._trip(Heartbeat())
        return NUM_STEPS / (time.perf_counter() - started_s)

    async def frames(self) -> float:
        """Return payload in GB per second."""
        payload = memoryview(bytearray(FRAME_BYTES))
        started_s = time.perf_counter()
        for number in range(NUM_FRAMES):
            self._transport.send(ROUTER, Heartbeat(), [payload])
            if number >= WINDOW:
                await self._answers.get()
        for _ in range(min(WINDOW, NUM_FRAMES)):
            await self._answers.get()
        return NUM_FRAMES * FRAME_BYTES / 1e9 / (time.perf_counter() - started_s)

    async def trips(self) -> float:
        """Return microseconds per round trip."""
        started_s = time.perf_counter()
        for _ in range(NUM_TRIPS):
            await self._trip(Heartbeat())
        return (time.perf_counter() - started_s) / NUM_TRIPS * 1e6

    async def _trip(self, message: Message) -> None:
        self._transport.send(ROUTER, message)
        answer = await self._answers.get()
        assert isinstance(answer, Received), answer

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()


async def measure(addresses: Sequence[str], keys: Keys, rounds: int) -> Table:
    """Measure both servers, in turns."""
    plain, keyed = Client(addresses[0], None), Client(addresses[1], keys)
    figures: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(rounds + 1):
        for name in ("steps", "frames", "trips"):
            pair = figures.setdefault(name, ([], []))
            for client, values in zip((plain, keyed), pair, strict=True):
                value = await getattr(client, name)()
                if number:  # the first round warms up
                    values.append(value)
    plain.close()
    keyed.close()
    table = Table("", "without keys", "with keys", "ratio", box=None)
    for title, name in (("step messages/s", "steps"), ("KV frames, GB/s", "frames"), ("round trip, us", "trips")):
        without, with_keys = map(statistics.median, figures[name])
        table.add_row(title, f"{without:,.2f}", f"{with_keys:,.2f}", f"{with_keys / without:.2f}")
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_keys(directory, ["router", "d0"])
        servers = []
        for keys in (None, Keys.load(directory, "router")):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, keys))
            process.start()
            servers.append((ours, process))
        addresses = [ours.recv() for ours, _ in servers]
        Console().print(uvloop.run(measure(addresses, Keys.load(directory, "d0"), rounds)))
        for ours, process in servers:
            ours.send(None)
            process.join()


if __name__ == "__main__":
    main()
