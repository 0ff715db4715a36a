"""Where the processes of a cluster listen, and whether they could."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from support.ports import free_ports

from kvrelay.cluster.addresses import addresses, require_free_addresses, taken_addresses
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError
from kvrelay.runtime.listening import listen_problem


def config_of(
    http: int, control: int, node: int, host: str = "127.0.0.1", admin: int = 4, **sections: object
) -> ClusterConfig:
    return ClusterConfig.from_data(
        {
            "router": {"port": http, "admin_port": admin, "control": f"tcp://127.0.0.1:{control}"},
            "nodes": [{"name": "m0", "role": "mixed", "host": host, "port": node}],
            **sections,
        }
    )


def test_every_address_of_a_cluster_has_its_key() -> None:
    redis: dict[str, Any] = {"registry": {"kind": "redis", "url": "redis://127.0.0.1:6379/0"}}
    by_key = {
        "router.port": ("127.0.0.1", 1),
        "router.admin_port": ("127.0.0.1", 4),
        "nodes.m0.port": ("127.0.0.1", 3),
    }

    assert addresses(config_of(1, 2, 3)) == by_key | {"router.control": ("127.0.0.1", 2)}
    assert addresses(config_of(1, 2, 3, **redis)) == by_key


def test_all_that_are_taken_are_listed() -> None:
    http, control, node, admin = free_ports(4)
    config = config_of(http, control, node, admin=admin)
    assert taken_addresses(config) == {}
    require_free_addresses(config)

    with (
        socket.create_server(("127.0.0.1", config.router.port)),
        socket.create_server(("127.0.0.1", config.nodes[0].port)),
        pytest.raises(ConfigError) as caught,
    ):
        require_free_addresses(config)

    assert caught.value.problems == [
        f"router.port: cannot listen at 127.0.0.1:{config.router.port}: Address already in use",
        f"nodes.m0.port: cannot listen at 127.0.0.1:{config.nodes[0].port}: Address already in use",
    ]


def test_an_address_of_another_host() -> None:
    (port,) = free_ports(1)

    assert listen_problem("192.0.2.1", port) == f"cannot listen at 192.0.2.1:{port}: Cannot assign requested address"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this Python")
def test_an_ipv6_address_with_and_without_brackets() -> None:
    (port,) = free_ports(1)
    if listen_problem("::1", port) is not None:
        pytest.skip("no IPv6 loopback here")

    assert listen_problem("::1", port) is None
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert listen_problem("::1", port) == f"cannot listen at [::1]:{port}: Address already in use"
