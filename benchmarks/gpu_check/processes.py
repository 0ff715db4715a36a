"""Clusters of real processes on this host, and the clients that ask them. Whatever happens, none of them is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml
from support.server_ports import free_ports

from gpu_check.jobs import Answer, Ask, Done, Job
from gpu_check.stream_times import Stream
from kvrelay.cluster.client import ClusterClient
from kvrelay.errors import KVRelayError

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 20.0
POLL_S = 0.05

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

Config = dict[str, Any]


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _start(arguments: Sequence[str], paths: Sequence[Path], **more: Any) -> subprocess.Popen[bytes]:
    """Start Python in a session of its own, with ``paths`` before what this process imports from, but no tests."""
    given = [path for path in sys.path if path and not Path(path).is_relative_to(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *given]), **more.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", *arguments],
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 (it calls nothing but the kernel)
        **more,
    )


def kill_session(leader: int) -> None:
    """Kill every process of the session that ``leader`` leads, and wait until they have ended."""
    deadline_s = time.monotonic() + STOP_S
    while (pids := session_pids(leader)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def session_pids(leader: int) -> list[int]:
    """Return the processes of a session, those that have ended apart."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if os.getsid(pid) == leader and _fields(pid)[0] != "Z":
                found.append(pid)
    return found


def cpu_seconds(leader: int) -> dict[str, float]:
    """Return the CPU time of each process of a session by its title."""
    used: dict[str, float] = {}
    for pid in session_pids(leader):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[0].decode()
            fields = _fields(pid)
            used[title] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Cluster:
    """A cluster that ``kvrelay up`` runs. ``nodes``: role and own sections by name."""

    def __init__(self, folder: Path, name: str, nodes: dict[str, Config], sections: Config) -> None:
        self.name = name
        http, admin, control, *ports = free_ports(3 + len(nodes))
        router = {"port": http, "admin_port": admin, "control": f"tcp://127.0.0.1:{control}", "access_log": False}
        placed = [{"name": node, "port": port, **own} for (node, own), port in zip(nodes.items(), ports, strict=True)]
        self.port = http
        self._names = set(nodes)
        self._folder = folder / name.replace(" ", "-")
        (self._folder / "run").mkdir(parents=True)
        path, self._log = self._folder / "cluster.yaml", self._folder / "log"
        path.write_text(yaml.safe_dump({**sections, "router": router, "nodes": placed}))
        self._client = ClusterClient(f"http://127.0.0.1:{admin}")
        self.began_s = time.monotonic()
        with self._log.open("wb") as log:
            self._process = _start(
                ["-m", "kvrelay.cluster", "up", str(path)],
                [ROOT],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    "XDG_RUNTIME_DIR": str(self._folder / "run"),
                    "NO_COLOR": "1",
                    "COLUMNS": "200",
                    "KVRELAY_CLUSTER__LOG_FORMAT": "text",
                },
                cwd=self._folder,
            )

    @property
    def log(self) -> str:
        """What its processes have written."""
        return self._log.read_text(errors="replace")

    def wait_until_up(self, patience_s: float) -> float:
        """Return the seconds from its start until all nodes serve. Raises RuntimeError if that does not come."""
        while not self._is_up():
            seconds = time.monotonic() - self.began_s
            code = self._process.poll()
            if code is not None or seconds > patience_s:
                problem = f"not up after {seconds:.0f} s" if code is None else f"ended with {code}"
                raise RuntimeError(f"cluster {self.name}: {problem}:\n{self.log[-3000:]}")
            time.sleep(POLL_S)
        return time.monotonic() - self.began_s

    def _is_up(self) -> bool:
        try:
            return {node["name"] for node in self.status()} == self._names and not self._client.not_ready_because()
        except KVRelayError:
            return False

    def status(self) -> list[dict[str, Any]]:
        """Return what the router knows of each node, its load as of the last heartbeat."""
        nodes: list[dict[str, Any]] = self._client.status()["nodes"]
        return nodes

    def counters(self, node: str) -> dict[str, float]:
        """Return the counters of one node as of its last heartbeat."""
        counters: dict[str, float] = next(one for one in self.status() if one["name"] == node)["load"]["counters"]
        return counters

    def timeline(self, request_id: str) -> dict[str, Any]:
        """Return the timeline of a request that has ended not long ago."""
        return self._client.timeline(request_id)

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time of each process by its title."""
        return cpu_seconds(self._process.pid)

    def stop(self) -> None:
        """End it as an operator would. Raises RuntimeError if it does not end well."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        if code != 0 or "Traceback" in self.log:
            raise RuntimeError(f"cluster {self.name} ended with {code}:\n{self.log[-3000:]}")

    def kill(self) -> None:
        """End it at once."""
        kill_session(self._process.pid)
        self._process.wait()
        self._client.__exit__()


class Clients:
    """Processes that send completions; the parts of a load are dealt to them by turns."""

    def __init__(self, count: int) -> None:
        paths = [ROOT, ROOT / "benchmarks"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._processes = [_start(["-m", "gpu_check.client"], paths, **pipes) for _ in range(count)]

    def ask(self, port: int, asks: Sequence[Ask]) -> list[Answer]:
        """Return the answers of the router at ``port``, in the order of ``asks``. Raises RuntimeError if one fails."""
        count = len(self._processes)
        for index, process in enumerate(self._processes):
            self._write(process, msgspec.json.encode(Job(port, list(asks[index::count]))))
        for process in self._processes:
            self._read(process)
        begin_s = time.monotonic() + 0.02
        for process in self._processes:
            self._write(process, str(begin_s).encode())
        found: list[Answer] = [Answer("", [], Stream(0.0, [], []))] * len(asks)
        # all are read before any error is raised, so that the next job finds none of this one's lines
        results = [msgspec.json.decode(self._read(process), type=Done) for process in self._processes]
        for index, done in enumerate(results):
            if done.error:
                raise RuntimeError(f"a request failed: {done.error}")
            found[index::count] = done.answers
        return found

    @staticmethod
    def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client ended with {process.wait()}")
        return line

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            kill_session(process.pid)
            with contextlib.suppress(BrokenPipeError):
                process.communicate()
