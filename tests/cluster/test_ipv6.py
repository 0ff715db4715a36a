"""A cluster that has no IPv4 at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.asking import answers, assert_right, random_asks
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p
from support.ipv6 import NAME, needs_ipv6, with_name

pytestmark = needs_ipv6


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    config = cluster_config(
        model, p(host="::1"), d(host="::1"), engine=fake_engine(step_s=0.001), transfer={"link": "tcp"}
    )
    control_port = config["router"]["control"].rpartition(":")[2]
    config["router"] |= {"host": "::1", "control": f"tcp://[::1]:{control_port}"}
    with running(config) as cluster:
        yield cluster


def test_nodes_by_a_name_that_has_only_an_ipv6_address(model: Path, tmp_path: Path) -> None:
    config = cluster_config(
        model,
        p(host=NAME),
        d(host=NAME),
        engine=fake_engine(step_s=0.001),
        transfer={"link": "tcp"},
        security={"insecure": True},  # a name may be that of another host
    )
    control_port = config["router"]["control"].rpartition(":")[2]
    config["router"] |= {"host": "::1", "control": f"tcp://{NAME}:{control_port}"}
    with running(config, with_name(tmp_path)) as cluster:
        asks = random_asks(6, 20)
        given = answers(cluster, asks)
        assert assert_right(cluster, asks, given) == len(asks)
        cluster.wait_until_quiescent()
        assert cluster.status()["requests"]["kv_bytes_moved"] > 0
        assert {node["address"] for node in cluster.status()["nodes"]} == {
            f"tcp://{NAME}:{node.port}" for node in cluster.config.nodes
        }


def kvrelay(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("kvrelay")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return done.stdout


def test_tokens_are_right_and_kv_moves(cluster: Cluster) -> None:
    asks = random_asks(6, 20)
    given = answers(cluster, asks)
    assert assert_right(cluster, asks, given) == len(asks)
    cluster.wait_until_quiescent()
    assert cluster.status()["requests"]["kv_bytes_moved"] > 0


def test_nothing_listens_at_ipv4(cluster: Cluster) -> None:
    listening = [
        connection.laddr
        for pid in cluster.lasting()
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 6  # the router's two, each node's and its messager's
    assert {address.ip for address in listening} == {"::1"}


def test_urls_have_brackets_and_commands_take_them(cluster: Cluster) -> None:
    port = cluster.config.router.port
    assert cluster.url == f"http://[::1]:{port}"
    until("the URL is shown", lambda: f"ready: http://[::1]:{port}/v1 serves demo" in cluster.log())
    assert {node["address"] for node in cluster.status()["nodes"]} == {
        f"tcp://[::1]:{node.port}" for node in cluster.config.nodes
    }
    shown = kvrelay("status", cluster.config.router.admin_url)
    assert all(f"[::1]:{node.port}" in shown for node in cluster.config.nodes)
    assert kvrelay("chat", cluster.url, "--max-tokens", "4", "hello").strip()


def test_the_access_log_has_ipv6_clients_and_refused_requests(cluster: Cluster) -> None:
    refused = cluster.http.post("/v1/completions", json={"prompt": 3})
    assert refused.status_code == 400
    request_id = refused.headers["x-request-id"]
    (line,) = until("the line is there", lambda: [line for line in cluster.log().splitlines() if request_id in line])
    assert "http request method=POST path=/v1/completions status=400" in line
    assert line.endswith("client=::1")
