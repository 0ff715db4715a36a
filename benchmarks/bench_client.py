"""What a stream costs the client of ``kvrelay bench``, next to aiohttp (which ``vllm bench serve`` uses) and httpx.

A server without a model, in a process of its own, streams chunks to many requests at once. Counted is the client's CPU
time, so that other jobs of the machine matter little. aiohttp and httpx read as a load generator does: they split
events, decode their JSON and note when they came. aiohttp is compared if it is installed.

Usage: python benchmarks/bench_client.py [--streams 64 256 1024] [--chunks 100] [--step-ms 10] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import uvloop

from kvrelay.bench.http import Client
from kvrelay.bench.streams import stream

_SERVER = Path(__file__).parent / "support" / "mock_stream_server.py"
_BODY = {"model": "mock", "prompt": "x", "max_tokens": 1, "stream": True}


async def _ours(url: str, num_streams: int) -> int:
    client = Client(url)
    records = await asyncio.gather(*(stream(client, "/v1/completions", _BODY, 7) for _ in range(num_streams)))
    client.close()
    return sum(len(record.chunk_times_s) for record in records)


def _count(event: str, times: list[float]) -> None:
    if event.startswith("data: ") and event != "data: [DONE]" and json.loads(event[6:]).get("choices"):
        times.append(time.perf_counter())


async def _aiohttp(url: str, num_streams: int) -> int:
    import aiohttp  # noqa: PLC0415

    times: list[float] = []

    async def one(session: aiohttp.ClientSession) -> None:
        async with session.post(f"{url}/v1/completions", json=_BODY) as response:
            rest = ""
            async for data in response.content.iter_any():
                *events, rest = (rest + data.decode()).split("\n\n")
                for event in events:
                    _count(event, times)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session) for _ in range(num_streams)))
    return len(times)


async def _httpx(url: str, num_streams: int) -> int:
    times: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", f"{url}/v1/completions", json=_BODY) as response:
            async for line in response.aiter_lines():
                _count(line, times)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(num_streams)))
    return len(times)


def _chunks_per_cpu_s(run: Callable[[str, int], Awaitable[int]], url: str, num_streams: int) -> tuple[float, float]:
    """Return chunks per second of the client's CPU time, and the share of a core that it used."""

    async def measured() -> tuple[float, float]:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        num_chunks = await run(url, num_streams)
        cpu_s = time.process_time() - cpu_s
        return num_chunks / cpu_s, cpu_s / (time.perf_counter() - wall_s)

    return uvloop.run(measured())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clients = {"kvrelay bench": _ours, "httpx": _httpx}
    if find_spec("aiohttp"):
        clients["aiohttp"] = _aiohttp
    command = [sys.executable, str(_SERVER), str(arguments.chunks), str(arguments.step_ms / 1000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        for num_streams in arguments.streams:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
            for _ in range(arguments.rounds):
                for name, run in clients.items():
                    found[name].append(_chunks_per_cpu_s(run, url, num_streams))
            base = statistics.median(rate for rate, _ in found["kvrelay bench"])
            for name, values in found.items():
                rate = statistics.median(rate for rate, _ in values)
                share = statistics.median(share for _, share in values)
                print(
                    f"{num_streams:5} streams  {name:14} {rate:8,.0f} chunks and {rate / arguments.chunks:6,.0f} "
                    "streams per CPU second  "
                    f"({rate / base:.2f} of ours), {100 * share:.0f} % of a core"
                )
        server.terminate()


if __name__ == "__main__":
    main()
