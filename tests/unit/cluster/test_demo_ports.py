"""The demo moves to free ports where its own are taken."""

from __future__ import annotations

import pytest
from rich.console import Console
from support.ipv6 import needs_ipv6
from support.ports import free_ports

from kvrelay.addresses import listen_at, tcp_address
from kvrelay.cluster.demo import _other_ports
from kvrelay.config.cluster_config import ClusterConfig


def config(host: str, port: int, control_port: int, node_port: int, admin_port: int | None = None) -> ClusterConfig:
    return ClusterConfig.from_data(
        {
            "router": {
                "host": host,
                "port": port,
                "control": tcp_address(host, control_port),
                "admin_port": admin_port,
            },
            "engine": {"kind": "fake"},
            "nodes": [{"name": "m0", "role": "mixed", "host": host, "port": node_port}],
        }
    )


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_taken_ports_are_replaced_by_free_ones(host: str) -> None:
    with listen_at(host, 0, 1) as taken, listen_at(host, 0, 1) as other, listen_at(host, 0, 1) as third:
        ports = [item.getsockname()[1] for item in (taken, other, third)]
        other.close()
        third.close()
        wanted = config(host, *ports)
        overrides = dict(item.split("=", 1) for item in _other_ports(wanted, Console(quiet=True)))
    assert overrides.keys() == {"router.port", "router.admin_port", "router.control", "nodes.m0.port"}
    assert overrides["router.control"].startswith(tcp_address(host, 0)[:-1])
    chosen = [value.rpartition(":")[2] for value in overrides.values()]
    assert len(set(chosen)) == 4
    assert str(ports[0]) not in chosen


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_free_ports_are_kept(host: str) -> None:
    assert _other_ports(config(host, *free_ports(4)), Console(quiet=True)) == []
