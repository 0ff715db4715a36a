"""A real Mooncake master for tests."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.ports import free_ports

from kvrelay.addresses import netloc

CAPACITY_BYTES = 64 << 20
PATIENCE_S = 120.0


def why_no_mooncake() -> str | None:
    """Return why there can be no Mooncake here, or None if there can."""
    os.environ.setdefault("GLOG_minloglevel", "3")
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        return f"no Mooncake here: {error}"
    return None


class MooncakeMaster:
    """A master on loopback ports, until ``kill``."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.port, self._metrics_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return netloc(self._host, self.port)

    def start(self) -> None:
        """Start it and wait until it serves."""
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None
        assert spec.origin is not None
        command = [str(Path(spec.origin).with_name("mooncake_master")), f"--rpc_address={self._host}"]
        command += [f"--rpc_port={self.port}", f"--metrics_port={self._metrics_port}", "--metrics_host=127.0.0.1"]
        environment = {**os.environ, "GLOG_minloglevel": "0"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line.decode())
            if b"admin server started" in line:
                self._wait_until_it_listens()
                return
        raise RuntimeError("mooncake_master did not start:\n" + "".join(said))

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((self._host, self.port), PATIENCE_S).close()
                return
            time.sleep(0.02)  # it says nothing when its port is open
        raise RuntimeError("mooncake_master does not listen")

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
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


@contextlib.contextmanager
def mooncake_master() -> Iterator[MooncakeMaster]:
    """Run a master."""
    master = MooncakeMaster()
    try:
        master.start()
        join(master).close()  # makes what the library keeps for the life of the process
        yield master
    finally:
        master.kill()


def join(master: MooncakeMaster) -> Any:
    """Return a client of the library."""
    client = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", CAPACITY_BYTES, 16 << 20, "tcp", "", master.address) == 0
    return client
