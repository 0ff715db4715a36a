"""The processes themselves: their names, their refusals, and a cluster put together by hand as over several hosts."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.asking import answers, assert_right, random_asks
from support.cluster import PATIENCE_S, Cluster
from support.cluster_config import Config, cluster_config, d, fake_engine, m, p


def test_ps_shows_role_and_name_of_each_process(fake_cluster: Cluster) -> None:
    nodes = {"kvrelay prefill p0", *(f"kvrelay decode d{index}" for index in range(3))}
    messagers = {f"kvrelay messager {name}" for name in ("p0", "d0", "d1", "d2")}
    supervisor = f"kvrelay up {fake_cluster.config_path}"
    assert sorted(fake_cluster.lasting().values()) == sorted([supervisor, "kvrelay router", *nodes, *messagers])


@pytest.mark.fault("F27")
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("d0", {"cache": {"block_size": 32}}, "KV geometry differs"),
        ("d0", {"engine": fake_engine(vocab_size=1000)}, "KV geometry differs"),
        ("d0", {"model": {"served_name": "other"}}, "model 'other', the cluster serves 'demo'"),
        ("d9", {}, "the router's config has no node d9"),
        ("d0", {}, "d0 listens at"),
    ],
    ids=["block size", "model", "model name", "node name", "address"],
)
def test_a_node_that_does_not_match_is_refused(
    fake_cluster: Cluster, model: Path, name: str, changes: Config, reason: str
) -> None:
    sections = {"engine": fake_engine(), "router": {"control": fake_cluster.config.router.control}, **changes}
    nodes = fake_cluster.incarnations()
    stranger = Cluster(cluster_config(model, p(), d(name), **sections))
    try:
        assert stranger.kvrelay("decode", "--node", name).wait(PATIENCE_S) == 2
        assert reason in stranger.log()
        assert not stranger.runtime_files()
    finally:
        stranger.close()
    assert fake_cluster.incarnations() == nodes


@pytest.mark.parametrize(
    ("verbs", "nodes"),
    [(["prefill", "decode"], [p(), d()]), (["mixed"], [m()])],
    ids=["1P1D", "mixed"],
)
def test_roles_started_one_by_one_make_a_cluster(model: Path, verbs: list[str], nodes: list[Config]) -> None:
    """The same file for each process; the nodes are there before their router."""
    cluster = Cluster(cluster_config(model, *nodes, engine=fake_engine()))
    asks = random_asks(50, 20)
    try:
        commands = [[verb, "--node", str(node["name"])] for verb, node in zip(verbs, nodes, strict=True)]
        with by_hand(cluster, *commands, ["router"]) as processes:
            cluster.wait_until_up()
            assert assert_right(cluster, asks, answers(cluster, asks)) == len(asks)
            cluster.wait_until_quiescent()

            for process in processes:
                process.send_signal(signal.SIGTERM)
            assert [process.wait(PATIENCE_S) for process in processes] == [0] * len(processes)
        assert not cluster.runtime_files()
    finally:
        cluster.close()


@contextmanager
def by_hand(cluster: Cluster, *commands: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run ``kvrelay VERB CONFIG ...`` for each of ``commands``."""
    processes = []
    try:
        for verb, *arguments in commands:
            processes.append(cluster.kvrelay(verb, *arguments))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
