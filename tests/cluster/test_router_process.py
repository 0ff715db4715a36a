"""A router as a process of its own: what long bodies and many connections cost it, seen from outside."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from support.cluster import has_ended, until
from support.ports import free_ports

MIB = 1 << 20
MAX_CPU_S = 0.5
"""To take 16 MiB from a socket and pass them on costs a tenth of that; to tokenize 1 MiB twice as much."""


@dataclass
class Router:
    process: psutil.Popen
    port: int
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, content: bytes) -> httpx.Response:
        return httpx.post(self.url + path, content=content, timeout=100, trust_env=False)

    def is_alive(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=60, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def cpu_s(self) -> float:
        """Return the CPU time of all threads of the router, not that of its workers."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextmanager
def router_process(directory: Path, descriptors: tuple[int, int] | None = None, **router: object) -> Iterator[Router]:
    port, admin, control, node = free_ports(4)
    config = {
        "model": {"path": "nowhere", "served_name": "demo", "max_model_len": 512},
        "router": {"port": port, "admin_port": admin, "control": f"tcp://127.0.0.1:{control}", **router},
        "engine": {"kind": "fake"},
        "nodes": [{"name": "m0", "role": "mixed", "port": node}],
    }
    (directory / "cluster.yaml").write_text(yaml.safe_dump(config))
    arguments = [sys.executable, "-m", "router", str(directory / "cluster.yaml")]
    with (directory / "log").open("wb") as log:
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)) if descriptors else None
        process = psutil.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, preexec_fn=limit)
    running = Router(process, port, directory / "log")
    try:
        until("the router answers", running.is_alive)
        yield running
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        print(running.log()[-4000:])


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router_process(tmp_path_factory.mktemp("router")) as running:
        yield running


def _body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/tokenize", _body(prompt="Das ist ein Satz. " * (4 * MIB // 18)), 200),
        ("/v1/completions", _body(prompt="Das ist ein Satz. " * (4 * MIB // 18)), 400),
        ("/v1/completions", _body(prompt="a" * (16 * MIB - 100)), 400),
        ("/v1/completions", _body(prompt=["a"] * 500_000), 400),
        ("/v1/completions", _body(prompt="a", stop=[0] * 100_000), 400),
        ("/v1/chat/completions", _body(messages=[{"role": "user", "content": "hi"}] * 400_000), 400),
        ("/detokenize", _body(tokens=list(range(256)) * 8_000), 200),
    ],
    ids=["tokenize", "text", "16 MiB", "prompts", "wrong field", "messages", "detokenize"],
)
def test_long_bodies_cost_the_router_no_work(router: Router, path: str, content: bytes, status: int) -> None:
    before_s = router.cpu_s()
    response = router.post(path, content)
    assert response.status_code == status, response.text[:300]
    took_s = router.cpu_s() - before_s
    print(f"{took_s:.2f} s")
    assert took_s < MAX_CPU_S


def test_memory_of_long_bodies_is_given_back(router: Router) -> None:
    content = _body(prompt="a" * (16 * MIB - 100))
    router.post("/v1/completions", content)
    before = router.process.memory_info().rss
    for _ in range(4):
        assert router.post("/v1/completions", content).status_code == 400
    until("workers have ended", lambda: not router.process.children())
    assert router.process.memory_info().rss - before < 32 * MIB


def test_worker_does_not_outlive_a_router_that_is_killed(tmp_path: Path) -> None:
    with router_process(tmp_path) as router, socket.create_connection(("127.0.0.1", router.port)) as client:
        content = _body(prompt="ab" * (4 * MIB))
        client.sendall(b"POST /tokenize HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        (worker,) = until("a worker has begun", router.process.children)
        router.process.kill()
        router.process.wait()
        until("the worker has ended", lambda: has_ended(worker.pid))


def test_soft_limit_of_descriptors_is_raised(tmp_path: Path) -> None:
    with router_process(tmp_path, descriptors=(128, 1024)) as router:
        assert router.process.rlimit(psutil.RLIMIT_NOFILE) == (1024, 1024)


def test_connections_beyond_the_limit_of_descriptors_are_answered_503_and_logged_once(tmp_path: Path) -> None:
    def statuses(connections: list[socket.socket]) -> Counter[bytes]:
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        return Counter(connection.recv(4096)[:12] for connection in connections)

    with router_process(tmp_path, descriptors=(64, 64)) as router:
        for _ in range(2):
            with ExitStack() as stack:
                address = ("127.0.0.1", router.port)
                connections = [stack.enter_context(socket.create_connection(address, 60)) for _ in range(100)]
                found = statuses(connections)
            assert set(found) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
            assert found[b"HTTP/1.1 200"] > 10
            until("the router answers again", router.is_alive)
        assert router.log().count("too many connections") == 2
