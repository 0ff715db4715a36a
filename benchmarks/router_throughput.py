"""What the router costs: latency it adds, requests, chunks and streamed tokens per second of its CPU time.

    python benchmarks/router_throughput.py [--seconds 5] [--streams 64] [--workers 2] [--baselines DIRECTORY]

One router, a node without an engine (``support/router_node.py``) and a load client with keep-alive connections
(``support/router_client.py``), each a process of its own. Rates per core are per CPU second of the router's
processes, so they hardly depend on what else runs on the machine; rates per second do. Baselines, in the same run:
the load client at a bare mock server (``direct``), and through ``vllm-router`` and ``sglang-router`` in front of it,
if DIRECTORY is a virtual environment with those packages from PyPI. The ratio is to the first of them that is there.
Neighbours on the machine also make a CPU second worth less, by up to 1.6 here. So the time per request and chunk is
taken in windows of half a second too: the median, and the least, which hardly depends on neighbours.
``--workers``: our router again, with so many (``router.workers``). CPU time per request and chunk is that of the
router's own process, and that of its workers.

- added latency: 16 requests at once whose node answers after 40 ms, minus the same directly at the mock;
- requests: 64 connections, one token each;
- chunks: streams whose node makes a step every 40 ms: one chunk per token;
- saturated: streams whose node makes steps as fast as the router takes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from support.cpu_time import cpu_s
from support.server_ports import free_ports

SUPPORT = Path(__file__).parent / "support"
START_TIMEOUT_S = 60.0
ANSWER_TOKENS = 256
PACE_US = 40_000


@dataclass(frozen=True)
class Case:
    """One load: connections, tokens per answer, pace of the node in microseconds."""

    name: str
    connections: int
    max_tokens: int
    pace_us: int
    stream: bool


@dataclass(frozen=True)
class Result:
    """What a load came to in the measured ``seconds``. CPU seconds are of the server's first process, and of others."""

    seconds: float
    first_cpu_s: float
    others_cpu_s: float
    requests: int
    chunks: int
    tokens: int
    latencies_ms: Sequence[float]
    windows: Sequence[Mapping[str, float]]
    """Of each half second: CPU seconds of all processes, and the requests, chunks and tokens."""

    @property
    def cpu_s(self) -> float:
        return self.first_cpu_s + self.others_cpu_s

    def cpu_us(self, count: int) -> str:
        """CPU time of the first process, and of the others if there are any, per one of ``count``."""
        first, others = (spent_s / max(1, count) * 1e6 for spent_s in (self.first_cpu_s, self.others_cpu_s))
        return f"{first:,.1f} + {others:,.1f} us" if others else f"{first:,.1f} us"

    def windows_us(self, name: str) -> str:
        """CPU time of all processes per one of ``name``: the median and the least of the windows."""
        spent = [window["cpu_s"] / window[name] * 1e6 for window in self.windows if window[name]]
        return f"{statistics.median(spent):,.1f}, least {min(spent):,.1f} us" if spent else "none"

    def latency_ms(self, percent: int) -> float:
        return self.latencies_ms[percent - 1]


def cases(streams: int) -> list[Case]:
    return [
        Case("latency", 16, 1, PACE_US, stream=False),
        Case("requests", 64, 1, 0, stream=False),
        Case("chunks", streams, ANSWER_TOKENS, PACE_US, stream=True),
        Case("saturated", streams, ANSWER_TOKENS, 0, stream=True),
    ]


def measure(case: Case, port: int, pid: int, seconds: float) -> Result:
    """Load the server ``pid`` at ``port``. Raises RuntimeError if an answer is wrong."""
    arguments = (port, case.connections, case.max_tokens, case.pace_us, int(case.stream), seconds)
    command = [sys.executable, str(SUPPORT / "router_client.py"), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        others = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        samples: list[dict[str, Any]] = []
        for line in client.stdout:
            spent_s = {"first_cpu_s": cpu_s([pid]), "others_cpu_s": cpu_s(others)}
            samples.append({**json.loads(line), **spent_s, "cpu_s": sum(spent_s.values())})
    first, result = samples[0], samples[-1]
    wrong = result["wrong"]
    if wrong:
        raise RuntimeError(f"{case.name}: wrong answers: {wrong}")
    counted = ("cpu_s", "requests", "chunks", "tokens")
    windows = [{name: after[name] - before[name] for name in counted} for before, after in pairwise(samples)]
    return Result(
        seconds=result["seconds"],
        first_cpu_s=result["first_cpu_s"] - first["first_cpu_s"],
        others_cpu_s=result["others_cpu_s"] - first["others_cpu_s"],
        requests=result["requests"],
        chunks=result["chunks"],
        tokens=result["tokens"],
        latencies_ms=result["latencies_ms"],
        windows=windows,
    )


@contextlib.contextmanager
def running(*command: str, port: int, log: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """Run a server until it answers at ``port``, for the context; its output goes to ``log``. Yields its pid."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
    try:
        _wait_for(f"http://127.0.0.1:{port}/ready", process)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    ends_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends_s and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code in (200, 404):
                return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} does not answer at {url}")


def kvrelay_config(
    port: int, admin_port: int, control: str, stream_interval: int | None, workers: int
) -> dict[str, Any]:
    router: dict[str, Any] = {"port": port, "admin_port": admin_port, "control": control, "max_queued_requests": 4096}
    router["workers"] = workers
    if stream_interval is not None:
        router["stream_interval"] = stream_interval
    return {
        "model": {"path": "nowhere", "served_name": "demo", "max_model_len": 4096},
        "router": {**router, "access_log": False},
        "engine": {"kind": "fake", "fake": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}},
        "nodes": [{"name": "m0", "role": "mixed", "port": 1}],
    }


@contextlib.contextmanager
def kvrelay(folder: Path, stream_interval: int | None, workers: int = 1) -> Iterator[tuple[int, int]]:
    """Run our router, with so many ``workers``, and one node. Yields its port and pid."""
    port, admin_port, control_port = free_ports(3)
    control = f"tcp://127.0.0.1:{control_port}"
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(kvrelay_config(port, admin_port, control, stream_interval, workers)))
    node = subprocess.Popen([sys.executable, str(SUPPORT / "router_node.py"), control])
    try:
        command = (sys.executable, "-m", "router", str(config))
        with running(*command, port=port, log=folder / "kvrelay.log") as pid:
            yield port, pid
    finally:
        node.kill()
        node.wait()


@contextlib.contextmanager
def mock(folder: Path) -> Iterator[tuple[int, int]]:
    """Run the bare mock server."""
    (port,) = free_ports(1)
    command = (sys.executable, str(SUPPORT / "router_mock.py"), str(port))
    with running(*command, port=port, log=folder / "mock.log") as pid:
        yield port, pid


@contextlib.contextmanager
def baseline(name: str, binaries: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """Run ``vllm-router`` or ``sglang-router`` in front of the bare mock server."""
    port, metrics_port = free_ports(2)
    with mock(folder) as (mock_port, _):
        arguments = ["--worker-urls", f"http://127.0.0.1:{mock_port}", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(metrics_port)]
        arguments += ["--disable-retries", "--disable-circuit-breaker"]
        launch = ["launch"] if name == "sglang-router" else []
        command = (str(binaries / name), *launch, *arguments)
        with running(*command, port=port, log=folder / f"{name}.log") as pid:
            httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False)
            yield port, pid


def report(console: Console, results: dict[str, dict[str, Result]]) -> None:
    direct = results["direct"]["latency"]
    rows: dict[str, dict[str, float]] = {}
    for name, found in results.items():
        latency = found["latency"]
        rows[name] = {
            "added p50, ms": latency.latency_ms(50) - direct.latency_ms(50),
            "added p99, ms": latency.latency_ms(99) - direct.latency_ms(99),
            "requests/s": found["requests"].requests / found["requests"].seconds,
            "per core": found["requests"].requests / found["requests"].cpu_s,
            "chunks/s": found["chunks"].chunks / found["chunks"].seconds,
            "chunks/s per core": found["chunks"].chunks / found["chunks"].cpu_s,
            "tokens per chunk": found["chunks"].tokens / max(1, found["chunks"].chunks),
            "saturated tokens/s": found["saturated"].tokens / found["saturated"].seconds,
            "per core ": found["saturated"].tokens / found["saturated"].cpu_s,
            "tokens per chunk ": found["saturated"].tokens / max(1, found["saturated"].chunks),
        }
    table = Table("", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in row.values()))
    other = next((name for name in rows if name.endswith("-router")), "direct")
    ours, theirs = rows["kvrelay"], rows[other]
    table.add_row(f"ratio to {other}", *(f"{ours[name] / theirs[name]:.2f}x" if theirs[name] else "" for name in ours))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--stream-interval", type=int, default=None)
    parser.add_argument("--workers", type=int, nargs="*", default=(), help="our router with so many workers too")
    parser.add_argument("--baselines", type=Path, default=None, help="a virtual environment with the other routers")
    parser.add_argument("--only", nargs="+", default=None, help="names of loads")
    options = parser.parse_args()
    console = Console(width=160)
    results: dict[str, dict[str, Result]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = {"direct": mock(folder), "kvrelay": kvrelay(folder, options.stream_interval)}
        for count in options.workers:
            servers[f"kvrelay, {count} workers"] = kvrelay(folder, options.stream_interval, count)
        for other in ("vllm-router", "sglang-router"):
            if options.baselines is not None and (options.baselines / "bin" / other).exists():
                servers[other] = baseline(other, options.baselines / "bin", folder)
            else:
                console.print(f"{other}: not there, no baseline")
        for server_name, server in servers.items():
            with server as (port, pid):
                results[server_name] = {}
                for case in cases(options.streams):
                    if options.only is None or case.name in options.only:
                        result = measure(case, port, pid, options.seconds)
                        results[server_name][case.name] = result
                        per_core = [count / result.cpu_s for count in (result.requests, result.chunks, result.tokens)]
                        shown = " ".join(f"{value:,.0f}" for value in per_core)
                        console.print(f"{server_name} {case.name}: per core: requests, chunks, tokens {shown}")
                        counts = {"request": result.requests, "chunk": result.chunks, "token": result.tokens}
                        spent = ", ".join(f"{result.cpu_us(count)} per {what}" for what, count in counts.items())
                        console.print(f"    CPU time: {spent}")
                        windows = ", ".join(f"{result.windows_us(f'{what}s')} per {what}" for what in counts)
                        console.print(f"    in windows: {windows}")
                        if result.latencies_ms:
                            median, late = result.latency_ms(50), result.latency_ms(99)
                            console.print(f"    latency: {median:.2f} ms, 99th percentile {late:.2f} ms")
    if options.only is None:
        report(console, results)


if __name__ == "__main__":
    main()
