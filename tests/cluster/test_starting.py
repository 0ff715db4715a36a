"""Processes that are told to end while they start, and processes that cannot start."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from support.asking import answers, assert_right, random_asks
from support.cluster import GONE_S, PATIENCE_S, START_PATIENCE_S, Cluster, assert_ended_well, has_ended, running, until
from support.cluster_config import Config, cluster_config, d, fake_engine, m, p
from support.cluster_fixtures import WriteCheckpoint

STOPPED_AT = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Stop())
sys.argv = ["kvrelay", *{arguments!r}]
runpy.run_module("kvrelay.cluster", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("kvrelay.cluster.cli", signal.SIGINT),
        ("paddle", signal.SIGTERM),
        ("paddle.nn", signal.SIGTERM),
        ("paddle.nn", signal.SIGINT),
        ("paddle.hapi", signal.SIGTERM),
        ("kvrelay.engine.decoder", signal.SIGTERM),
    ],
)
def test_a_node_that_is_told_to_end_while_it_imports_does_so_silently(
    checkpoint: WriteCheckpoint, module: str, number: signal.Signals
) -> None:
    """At the import of ``module``: Paddle installs handlers of its own between its first module and its last."""
    with configured(cluster_config(checkpoint("qwen2"), m())) as cluster:
        arguments = ["mixed", str(cluster.config_path), "--node", "m0"]
        script = STOPPED_AT.format(module=module, number=int(number), arguments=arguments)

        ended = subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=PATIENCE_S
        )

        assert ended.returncode == 0
        lines = (ended.stdout + ended.stderr).splitlines()
        assert [line for line in lines if " starting stage=" not in line] == []


@pytest.mark.parametrize(
    ("stage", "number"),
    [("loading weights", signal.SIGTERM), ("loading weights", signal.SIGINT), ("connecting", signal.SIGTERM)],
)
def test_a_node_is_told_to_end_in_each_stage_of_its_start(
    checkpoint: WriteCheckpoint, stage: str, number: signal.Signals
) -> None:
    with configured(cluster_config(checkpoint("qwen2"), p(), d())) as cluster:
        node = cluster.kvrelay("prefill", "--node", "p0")
        until(stage, lambda: f"starting stage={quoted(stage)}" in cluster.log(), START_PATIENCE_S)

        node.send_signal(number)

        assert node.wait(PATIENCE_S) == 0
        assert not crash_reports(cluster)
        assert not cluster.runtime_files()
        until("nothing is left of its group", lambda: not group_of(node.pid), GONE_S)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=["once", "twice"])
@pytest.mark.parametrize("line", ["kvrelay | starting", "p0 | importing Paddle", "p0 | loading weights"])
def test_a_cluster_is_told_to_end_while_it_starts(
    checkpoint: WriteCheckpoint, line: str, numbers: tuple[signal.Signals, ...]
) -> None:
    with configured(cluster_config(checkpoint("qwen2"), p(), d())) as cluster:
        cluster.start()
        until(line, lambda: line in cluster.log(), START_PATIENCE_S)

        for number in numbers:
            cluster.process.send_signal(number)

        assert_ended_well(cluster)
        assert "FatalError" not in cluster.log()
        assert "all processes have ended" in cluster.log()


def test_a_cluster_says_what_it_waits_for(fake_cluster: Cluster) -> None:
    names = ("router", "p0", "d0", "d1", "d2")
    for line in (f"kvrelay | starting {', '.join(names)}", *(f"{name} | ready" for name in names)):
        until(f"it says: {line}", lambda line=line: line in fake_cluster.log())  # type: ignore[misc]


# ------------------------------------------------------------ what cannot start


def test_a_node_whose_port_is_taken_says_so_in_a_line_and_exits_2(model: Path) -> None:
    config = cluster_config(model, p(), d(), engine=fake_engine())
    with configured(config) as cluster, listening(cluster.config.nodes[1].port) as port:
        assert cluster.kvrelay("decode", "--node", "d0").wait(PATIENCE_S) == 2

        assert cluster.log() == f"nodes.d0.port: cannot listen at 127.0.0.1:{port}: Address already in use\n"


def test_a_cluster_whose_ports_are_taken_lists_them_and_starts_nothing(model: Path) -> None:
    with configured(cluster_config(model, p(), d(), engine=fake_engine())) as cluster:
        with listening(cluster.config.router.port) as http, listening(cluster.config.nodes[1].port) as d0:
            cluster.start()
            assert cluster.process.wait(PATIENCE_S) == 2

        taken = "cannot listen at 127.0.0.1:{}: Address already in use\n"
        assert cluster.log() == f"router.port: {taken.format(http)}nodes.d0.port: {taken.format(d0)}"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"cache": {"num_blocks": 1 << 24}}, "cache.num_blocks: 16,777,216 blocks take "),
        (
            {"storage": {"backend": "file", "path": "/proc/kv", "capacity": "64MiB"}},
            "nodes.d0: cannot keep KV in /proc/kv",
        ),
        ({"cpus": [99999]}, "nodes.d0.cpus: this process may not use CPU 99999"),
    ],
    ids=["memory", "storage", "CPUs"],
)
def test_a_node_that_can_never_run_ends_the_cluster_at_once(model: Path, sections: Config, reason: str) -> None:
    with configured(cluster_config(model, p(), d(**sections), engine=fake_engine(head_dim=4096))) as cluster:
        cluster.start()

        assert cluster.process.wait(PATIENCE_S) == 2
        log = cluster.log()
        assert reason in log
        assert log.count("d0 exited with 2; not restarting it") == 1
        assert f"d0 cannot run with this config: {reason}" in log
        assert not leftovers(cluster)


def test_a_node_that_keeps_crashing_ends_the_cluster_and_requests_get_typed_errors(model: Path) -> None:
    """It serves in between: what counts is that its own code is at fault, again and again."""
    config = cluster_config(model, p(), d(), engine=fake_engine(step_s=0.01), cluster={"max_crashes": 2})
    with running(config) as cluster:
        asks = random_asks(60, 10, max_tokens=20)
        assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)
        incarnation = cluster.incarnations()["d0"]
        crash(cluster.pid("d0"))
        cluster.wait_until_restarted("d0", incarnation)
        assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)

        crash(cluster.pid("d0"))

        assert cluster.process.wait(PATIENCE_S) == 1
        log = cluster.log()
        assert "d0 was killed by SIGSEGV (a fault in native code: kernels, Paddle or another library)" in log
        assert "crash 2 in a row, not restarting it" in log
        assert not leftovers(cluster)


def crash(pid: int) -> None:
    """End a process as a fault in its native code would, without a core file."""
    resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    os.kill(pid, signal.SIGSEGV)


def group_of(leader: int) -> list[int]:
    """Return the processes that run of the group that ``leader`` led."""

    def belongs(pid: int) -> bool:
        with suppress(ProcessLookupError):  # it has ended since it was listed
            return os.getpgid(pid) == leader and not has_ended(pid)
        return False

    return [pid for pid in psutil.pids() if belongs(pid)]


def leftovers(cluster: Cluster) -> list[object]:
    """Return what is left of the processes of ``cluster``, the words of a crash included."""
    until("the last processes are gone", lambda: not cluster.pids(), GONE_S)
    return [*cluster.runtime_files(), *crash_reports(cluster)]


def crash_reports(cluster: Cluster) -> list[str]:
    """Return what was said of a crash."""
    return [line for line in cluster.log().splitlines() if "Traceback" in line or "FatalError" in line]


def quoted(stage: str) -> str:
    return f'"{stage}"' if " " in stage else stage


@contextmanager
def configured(config: Config) -> Iterator[Cluster]:
    """Give a cluster that is not running; whatever the test starts of it has ended afterwards."""
    cluster = Cluster(config)
    try:
        yield cluster
    finally:
        cluster.close()


@contextmanager
def listening(port: int) -> Iterator[int]:
    """Keep ``port`` taken."""
    with socket.create_server(("127.0.0.1", port)):
        yield port
