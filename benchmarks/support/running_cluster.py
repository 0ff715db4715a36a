"""A cluster of real processes for a benchmark, started with ``kvrelay up`` as an operator would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from support.cpu_time import cpu_s_by_title
from support.server_ports import free_ports

from kvrelay.cluster.client import ClusterClient
from kvrelay.engine.tiny import write_tiny_checkpoint

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.2

Config = dict[str, Any]


def cluster_config(nodes: Mapping[str, Config], sections: Config) -> Config:
    """Return the config of a cluster with free ports: its nodes (role and own sections) by name, all other sections."""
    http, admin, control, *ports = free_ports(3 + len(nodes))
    placed = [{"name": name, "port": port, **node} for (name, node), port in zip(nodes.items(), ports, strict=True)]
    addresses = {"port": http, "admin_port": admin, "control": f"tcp://127.0.0.1:{control}"}
    router = {**sections.get("router", {}), **addresses}
    return {**sections, "router": router, "nodes": placed}


class RunningCluster:
    """What a benchmark may ask of a cluster that is up."""

    def __init__(self, url: str, supervisor: psutil.Process) -> None:
        self.url = url
        self._supervisor = supervisor

    def loads(self) -> dict[str, dict[str, Any]]:
        """Return each node's load as of its last heartbeat."""
        with ClusterClient(self.url) as client:
            return {node["name"]: node["load"] for node in client.status()["nodes"]}

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds each process has used so far, by its title."""
        return cpu_s_by_title(self._supervisor.children(recursive=True))

    def pids(self, *titles: str) -> list[int]:
        """Return the processes with these titles."""
        children = self._supervisor.children(recursive=True)
        return [process.pid for process in children if " ".join(process.cmdline()).strip() in titles]


@contextmanager
def running(config: Config, preset: str = "tiny") -> Iterator[RunningCluster]:
    """Run a cluster on the model its config names, else a random checkpoint of ``preset`` (of which one with fake
    engines only reads the tokenizer).

    Raises RuntimeError, with the log, if it does not start or end well.
    """
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        directory = Path(name)
        if "path" not in config.get("model", {}):
            config = {**config, "model": {"path": str(directory / "model"), **config.get("model", {})}}
            write_tiny_checkpoint(directory / "model", "qwen2", preset=preset)
        (directory / "cluster.yaml").write_text(yaml.safe_dump(config))
        (directory / "run").mkdir()
        url = f"http://127.0.0.1:{config['router']['port']}"
        with (directory / "log").open("wb") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvrelay.cluster", "up", str(directory / "cluster.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "XDG_RUNTIME_DIR": str(directory / "run"), "NO_COLOR": "1"},
                start_new_session=True,
            )
        try:
            _wait_until_up(url, len(config["nodes"]), supervisor, directory / "log")
            yield RunningCluster(url, psutil.Process(supervisor.pid))
        finally:
            _stop(supervisor)


def _wait_until_up(url: str, num_nodes: int, supervisor: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with ClusterClient(url) as client:
        while client.not_ready_because() is not None or len(client.status()["nodes"]) < num_nodes:
            if supervisor.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the cluster did not start:\n{log.read_text(errors='replace')}")
            time.sleep(POLL_S)


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    """Let the cluster drain; if it does not, end the session it runs in."""
    supervisor.send_signal(signal.SIGTERM)
    try:
        supervisor.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _kill(psutil.Process(supervisor.pid).children(recursive=True))
        supervisor.kill()
        supervisor.wait()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()
