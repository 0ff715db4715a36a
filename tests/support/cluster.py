"""A cluster of real processes, started with ``kvrelay up`` as an operator would."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml

from kvrelay.config.cluster_config import ClusterConfig, FakeEngineConfig
from support.cluster_config import Config
from support.leaks import files_below

T = TypeVar("T")

PATIENCE_S = 120.0
"""What has not happened by then never will; on a busy machine things take long."""

START_PATIENCE_S = 240.0
GONE_S = 10.0
"""A process that has closed its pipes is there until the kernel is done with it: on a busy machine, for a moment."""

POLL_S = 0.02
SETTLED_HEARTBEATS = 3
"""Heartbeats after which a node's load tells of everything, its messager's report included, that was when asked."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

_SETTLED = ("num_waiting", "num_running", "num_receiving", "num_sending", "used_blocks", "queued_tokens")
_SETTLED_GAUGES = ("pending_signals", "inflight_bytes")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


def until(what: str, look: Callable[[], T | None], patience_s: float = PATIENCE_S) -> T:
    """Look again and again until ``look`` returns something true; return that. Fails in the name of ``what``."""
    deadline_s = time.monotonic() + patience_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline_s, f"not within {patience_s:g} s: {what}"
        time.sleep(POLL_S)


def has_ended(pid: int) -> bool:
    """Return whether a process runs no more. In some containers nobody ever takes note of the end of an orphan."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end_with_parent() -> None:
    """Have the kernel tell this process to end when the tests do, however they end."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Cluster:
    """One running cluster.

    Its processes are a session of their own, so that none can hide, and keep their sockets in a directory of their own.
    """

    def __init__(self, config: Config, prefix: Sequence[str] = ()) -> None:
        self._prefix = prefix
        self.config = ClusterConfig.from_data(config)
        self.url = self.config.router.url
        # Without kept connections: they would look like leaks of the test that made them.
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self.directory = Path(tempfile.mkdtemp(prefix="kvc-"))
        self.admin = httpx.Client(
            base_url=self.config.router.admin_url,
            timeout=PATIENCE_S,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self.config_path = self.directory / "cluster.yaml"
        self.config_path.write_text(yaml.safe_dump(config))
        self._log_path = self.directory / "log"
        self._runtime_dir = self.directory / "run"
        self._runtime_dir.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Start all processes; they are not up yet."""
        self._process = self.kvrelay("up")

    def kvrelay(self, verb: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``kvrelay VERB CONFIG``, in a session of its own."""
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [
                    *self._prefix,
                    str(Path(sys.executable).with_name("kvrelay")),
                    verb,
                    str(self.config_path),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "XDG_RUNTIME_DIR": str(self._runtime_dir),
                    "XDG_STATE_HOME": str(self.directory),
                    "NO_COLOR": "1",
                    "COLUMNS": "200",
                },
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (it calls nothing but the kernel)
            )

    def wait_until_up(self) -> None:
        """Wait until every node of the config serves."""
        until("all nodes are registered", self._is_up, START_PATIENCE_S)

    def _is_up(self) -> bool:
        if self._process is not None:
            assert self._process.poll() is None, f"kvrelay up ended with {self._process.returncode}:\n{self.log()}"
        try:
            return {node["name"] for node in self.status()["nodes"]} == {node.name for node in self.config.nodes}
        except httpx.TransportError:
            return False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor."""
        assert self._process is not None
        return self._process

    def pids(self) -> list[int]:
        """Return the processes there are, the supervisor's own included."""
        found = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self.process.pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def lasting(self) -> dict[int, str]:
        """Return the processes that run until somebody ends them, by pid, with what ``ps`` shows of each.

        Those that prepare long requests come and go by themselves.
        """
        titles = {pid: self.title(pid) for pid in self.pids()}
        return {pid: title for pid, title in titles.items() if title and "preparation" not in title}

    def memory(self) -> dict[int, int]:
        """Return the resident bytes of each lasting process."""
        found = {}
        for pid in self.lasting():
            with suppress(psutil.NoSuchProcess):
                found[pid] = int(psutil.Process(pid).memory_info().rss)
        return found

    def listening(self) -> set[int]:
        """Return every TCP port at which a lasting process listens."""
        return {
            connection.laddr.port
            for pid in self.lasting()
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    def runtime_files(self) -> list[Path]:
        """Return the sockets and directories the processes keep."""
        return files_below(self._runtime_dir)

    def log(self) -> str:
        """Return what the processes have written so far."""
        return self._log_path.read_text(errors="replace")

    def close(self) -> None:
        """Kill what is left and forget it; a clean end comes before."""
        self.http.close()
        self.admin.close()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            for pid in self.pids():
                with suppress(ProcessLookupError):  # it has ended since it was listed
                    os.kill(pid, signal.SIGKILL)
            # What they still remove must not be in the way of removing the directory.
            until("the killed processes have ended", lambda: not self.pids())
        if self._log_path.exists():
            print(self.log()[-8000:])
        shutil.rmtree(self.directory)

    # ------------------------------------------------------------ what it says of itself

    def status(self) -> dict[str, Any]:
        """Return ``/cluster`` as operators see it."""
        response = self.admin.get("/cluster")
        response.raise_for_status()
        status: dict[str, Any] = response.json()
        return status

    def node(self, name: str) -> dict[str, Any]:
        """Return what ``/cluster`` says of the node called ``name``."""
        return next(node for node in self.status()["nodes"] if node["name"] == name)

    def loads(self) -> dict[str, dict[str, Any]]:
        """Return the load of each node as of its last heartbeat."""
        return {node["name"]: node["load"] for node in self.status()["nodes"]}

    def metrics(self) -> Counter[str]:
        """Return ``/metrics``, summed over everything but the metric's name."""
        return Counter(self._summed(self.http.get("/metrics").text))

    @staticmethod
    def _summed(text: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for line in text.splitlines():
            sample = _SAMPLE.fullmatch(line)
            if sample is not None:
                values[sample[1]] = values.get(sample[1], 0.0) + float(sample[3])
        return values

    def counters(self) -> Counter[str]:
        """Return the counters of all nodes, summed; call when quiescent."""
        total: Counter[str] = Counter()
        for load in self.loads().values():
            total.update(load["counters"])
        return total

    def wait_until_quiescent(self) -> None:
        """Wait until no request is in progress and no node or messager holds anything, by reports made from now on."""
        asked = {node["pid"]: node["num_heartbeats"] for node in self.status()["nodes"]}
        reasons: list[str] = []

        def look() -> bool:
            reasons[:] = self._not_quiescent_because(asked)
            return not reasons

        try:
            until("the cluster is quiescent", look)
        except AssertionError as error:
            raise AssertionError(f"{error}: {'; '.join(reasons)}") from None

    def _not_quiescent_because(self, asked: Mapping[int, int]) -> list[str]:
        status = self.status()
        reasons = [
            f"{status['requests'][name]} requests {name}"
            for name in ("waiting", "running", "seeking_decode")
            if status["requests"][name]
        ]
        missing = {node.name for node in self.config.nodes} - {node["name"] for node in status["nodes"]}
        reasons += [f"{name} is not there" for name in sorted(missing)]
        for node in status["nodes"]:
            load = node["load"]
            held = {name: load[name] for name in _SETTLED} | {
                name: load["gauges"].get(name, 0) for name in _SETTLED_GAUGES
            }
            reasons += [f"{node['name']} has {name} = {value:g}" for name, value in held.items() if value]
            if node["num_heartbeats"] < asked.get(node["pid"], 0) + SETTLED_HEARTBEATS:
                reasons.append(f"{node['name']} has not reported since")
            elif load["free_blocks"] + load["evictable_blocks"] != node["num_blocks"]:
                reasons.append(f"{node['name']} has lost blocks")
        return reasons

    # ------------------------------------------------------------ its processes

    def pid(self, name: str) -> int:
        """Return the process of a node, or of the router."""
        if name == "router":
            return until("the router runs", self._router_pid)
        return int(self.node(name)["pid"])

    def _router_pid(self) -> int | None:
        return next((pid for pid in self.pids() if self.title(pid) == "kvrelay router"), None)

    def messager_pid(self, node: str) -> int:
        """Return the process of a node's messager."""
        (messager,) = psutil.Process(self.pid(node)).children()
        return messager.pid

    @staticmethod
    def title(pid: int) -> str:
        """Return what ``ps`` shows of a process; nothing if it has ended, perhaps since it was listed."""
        try:
            return " ".join(psutil.Process(pid).cmdline()).strip()
        except psutil.NoSuchProcess:
            return ""

    def incarnations(self) -> dict[str, str]:
        """Return which start of each node is registered: its pid, because the incarnation itself is not public."""
        return {node["name"]: str(node["pid"]) for node in self.status()["nodes"]}

    def wait_until_restarted(self, node: str, incarnation: str) -> None:
        """Wait until another start of ``node`` than ``incarnation`` is registered."""
        until(f"{node} is back", lambda: self.incarnations().get(node, incarnation) != incarnation)

    def fake(self) -> FakeEngineConfig:
        """Return what the engines of a cluster without a model go by."""
        return self.config.engine.fake


@contextmanager
def running(config: Config, prefix: Sequence[str] = ()) -> Iterator[Cluster]:
    """Run a cluster; when it is no more needed it must end well, unless the test has seen to its end.

    ``prefix``: beginning of the commands that start it.
    """
    cluster = Cluster(config, prefix)
    try:
        cluster.start()
        cluster.wait_until_up()
        yield cluster
        if cluster.process.poll() is None:
            cluster.process.send_signal(signal.SIGTERM)
            assert_ended_well(cluster)
    finally:
        cluster.close()


def assert_ended_well(cluster: Cluster) -> None:
    """Wait for the end of ``cluster``; nothing may be left of it, and nothing may have broken in its life."""
    assert cluster.process.wait(PATIENCE_S) == 0
    until("the last processes are gone", lambda: not cluster.pids(), GONE_S)
    assert not cluster.runtime_files()
    assert "Traceback" not in cluster.log()
