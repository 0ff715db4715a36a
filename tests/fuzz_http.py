"""Fuzzes the HTTP API of a running 1P1D cluster with the fake engine. See ``scripts/fuzz``.

``.venv/bin/python tests/fuzz_http.py --schemathesis .venv-fuzz/bin/st [--minutes 10] [--seed N]``: schemathesis makes
requests from the router's and the operators' OpenAPI documents. Meanwhile other clients send HTTP that is none, slow or
ambiguous, and some send requests whose answers are known. It ends with 1 if an answer was an undocumented error or
wrong, a process ended or grew, the log has an exception, or the router's loop was held for more than ``MAX_HELD_S``.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from support.asking import Ends, answers, assert_right, random_asks
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, fake_engine, p
from support.mutations import Mutator

from kvrelay.engine.tiny import write_tiny_checkpoint

MAX_HELD_S = 1.0
MAX_GROWTH_BYTES = 64 << 20
WARM_UP_SHARE = 0.3
"""Share of the time after which memory may grow no more than that."""

CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
"""What schemathesis checks: of 5xx only a documented 503, and errors in the form of the document."""

FULL: Ends = (429, "queue_full")
_PROBE_INTERVAL_S = 0.05
_FOUND = re.compile(r"^(Failures:|Errors:\n +\S+ (?!Runtime Error))", re.MULTILINE)
"""In the summary of schemathesis: failures, or errors of requests. A runtime error is one of its own."""

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")

_BODY = b'{"prompt": "hello", "max_tokens": 3}'
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/x%2Fy HTTP/1.0\r\n\r\n",
    _HEAD + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    _HEAD + b"Expect: 100-continue\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n\x1f\x8b\x08\0\0\0\0\0\0",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /cluster HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"DELETE /cluster/requests/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]
WORDS = (
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b": ",
        b"\r\n ",
        b"\x80\xff",
        b"%00",
        b"%",
        b"//",
        b"/../",
    ),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(b"Content-Length: 5, 6\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n"),
    *(b"Connection: close\r\n", b"Host: y\r\n", b"HTTP/9.9", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"a: b\r\n" * 2000),
    *(b"X-Request-Id: " + b"x" * 2000 + b"\r\n", b"Authorization: Bearer \xff\r\n", b"?" + b"a=b&" * 3000),
)


class Watch:
    """Asks for ``/health`` every 50 ms and notes for how long the loop of the router was held.

    That is the time of the answer, less the time for which the router's thread and this one waited for a CPU, which
    other programs of the machine decide.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._port = cluster.config.router.port
        self._router = cluster.pid("router")
        self.longest_held_s = 0.0
        self.num_probes = 0

    def probe(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            for _ in range(100):
                begin_s = time.monotonic() - self._waited_s()
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
                self.longest_held_s = max(self.longest_held_s, time.monotonic() - self._waited_s() - begin_s)
                self.num_probes += 1
                time.sleep(_PROBE_INTERVAL_S)

    def _waited_s(self) -> float:
        """Return for how long the two threads have waited for a CPU in their lives."""
        threads = (f"/proc/{self._router}/task/{self._router}", f"/proc/self/task/{threading.get_native_id()}")
        return sum(int(Path(thread, "schedstat").read_text().split()[1]) for thread in threads) / 1e9


class Run:
    """Clients of one cluster, until ``over``. ``problems``: what went wrong, each once."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.over = threading.Event()
        self.watch = Watch(cluster)
        self.statuses: Counter[int] = Counter()
        self.num_right = 0
        self.problems: list[str] = []
        self._rng = random.Random(seed)
        self._seed = seed
        work = [self.watch.probe, self._send_right, self._send_slow, *[self._send_garbage] * 3]
        self._threads = [threading.Thread(target=self._repeat, args=(each,)) for each in work]

    def __enter__(self) -> Run:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def note(self, problem: str) -> None:
        if len(self.problems) < 20 and problem not in self.problems:
            self.problems.append(problem)
            print(problem, flush=True)

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self.over.is_set():
            try:
                work()
            except Exception as error:  # whatever it is, it is a problem of the cluster's
                self.note(f"{work.__name__}: {type(error).__name__}: {error}")
                time.sleep(1)

    def _send_right(self) -> None:
        """Send requests whose tokens are known."""
        self._seed += 1
        asks = random_asks(self._seed, 8)
        self.num_right += assert_right(self.cluster, asks, answers(self.cluster, asks, limit=2), FULL)

    def _address(self) -> tuple[str, int]:
        router = self.cluster.config.router
        return self._rng.choice([("127.0.0.1", router.port)] * 3 + [router.admin_address])

    def _send_slow(self) -> None:
        """Open connections that send a byte now and then, and leave at some time."""
        connections = [socket.create_connection(self._address()) for _ in range(20)]
        try:
            for request in zip(*[self._rng.choice(REQUESTS).ljust(300) for _ in connections], strict=True):
                for connection, byte in zip(connections, request, strict=True):
                    with suppress(OSError):  # it was refused
                        connection.send(bytes([byte]))
                if self.over.wait(0.02):
                    return
        finally:
            for connection in connections:
                connection.close()

    def _send_garbage(self) -> None:
        mutator = Mutator(random.Random(self._rng.random()), REQUESTS, None, WORDS)
        for _ in range(200):
            if self.over.is_set():
                return
            data = mutator.next()
            answer = _exchange(self._address(), data)
            for status in map(int, _STATUS.findall(answer)):
                self.statuses[status] += 1
                if status >= 500 and not (status == 503 and b'"code":"' in answer):
                    self.note(f"status {status} for {data[:300]!r}: {answer[-300:]!r}")


def _exchange(address: tuple[str, int], data: bytes) -> bytes:
    """Send ``data`` and return what comes until the router has nothing more to say."""
    answer = b""
    with socket.create_connection(address, timeout=0.3) as connection, suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"HTTP API, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvf-") as directory:
        write_tiny_checkpoint(Path(directory), "qwen2")
        config = cluster_config(
            Path(directory),
            p(),
            d(),
            model={"max_model_len": 512},
            cache={"num_blocks": 1024},
            router={"max_queued_requests": 192, "request_read_timeout_s": 5},
            engine=fake_engine(step_s=0.001),
        )
        with running(config) as cluster:
            problems = _fuzz(cluster, arguments.schemathesis, 60 * arguments.minutes, arguments.seed)
            cluster.wait_until_quiescent()
    print(f"{len(problems)} problems")
    return 1 if problems else 0


def _fuzz(cluster: Cluster, schemathesis: str, seconds: float, seed: int) -> list[str]:
    """Return what went wrong. Raises AssertionError if a process ended."""
    before = _memory(cluster)
    with Run(cluster, seed) as run:
        parts = [
            ("clients", "coverage", cluster.url, WARM_UP_SHARE),
            ("operators", "coverage,fuzzing", cluster.config.router.admin_url, 0.1),
            ("clients", "fuzzing", cluster.url, 0.9 - WARM_UP_SHARE),
        ]
        warm: dict[int, int] = {}
        for number, (name, phases, url, share) in enumerate(parts):
            warm = warm or (_memory(cluster) if number else {})
            output = _schemathesis(schemathesis, url, phases, max(1, seconds * share), seed + number)
            print(f"---- {name}: {output.returncode}\n{output.stdout[-6000:]}", flush=True)
            if output.returncode and _FOUND.search(output.stdout):
                run.note(f"schemathesis found something in the API for {name}")
    cluster.wait_until_quiescent()
    after = _memory(cluster)
    assert after.keys() == before.keys(), "a process has ended"
    growth = {Cluster.title(pid): (after[pid] - warm[pid]) >> 20 for pid in after}
    print(f"answers to garbage by status: {dict(sorted(run.statuses.items()))}")
    print(f"{run.num_right} known answers right")
    print(f"loop held for at most {run.watch.longest_held_s:.3f} s in {run.watch.num_probes} probes")
    print(f"memory after the warm-up, MiB: {growth}")
    if run.watch.longest_held_s > MAX_HELD_S:
        run.note("the loop was held")
    if max(growth.values()) > MAX_GROWTH_BYTES >> 20:
        run.note("memory has grown")
    if "Traceback" in cluster.log():
        begin = cluster.log().index("Traceback")
        run.note(f"the log has an exception: {cluster.log()[begin - 300 : begin + 4000]}")
    return run.problems


def _schemathesis(command: str, url: str, phases: str, seconds: float, seed: int) -> subprocess.CompletedProcess[str]:
    arguments = [
        "run",
        f"{url}/openapi.json",
        "--checks",
        CHECKS,
        "--max-time",
        str(round(seconds)),
        "--seed",
        str(seed),
    ]
    arguments += [
        "--phases",
        phases,
        "--continue-on-failure",
        "--workers",
        "1",
        "--warnings",
        "off",
    ]
    arguments += ["--request-timeout", "60", "--suppress-health-check", "all", "--no-shrink", "--no-color"]
    with tempfile.TemporaryDirectory(prefix="kvf-") as directory:  # where it keeps its cache
        return subprocess.run(
            [Path(command).absolute(), *arguments], check=False, capture_output=True, text=True, cwd=directory
        )


def _memory(cluster: Cluster) -> dict[int, int]:
    """Return the resident memory of each process, in bytes, without preparation workers, which come and go."""
    return {
        pid: psutil.Process(pid).memory_info().rss for pid in cluster.pids() if "preparation" not in Cluster.title(pid)
    }


if __name__ == "__main__":
    sys.exit(main())
