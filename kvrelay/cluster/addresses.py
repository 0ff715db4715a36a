"""The addresses that the processes of a cluster listen at."""

from __future__ import annotations

from kvrelay.addresses import split_tcp_address
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError
from kvrelay.runtime.listening import listen_problem


def addresses(config: ClusterConfig) -> dict[str, tuple[str, int]]:
    """Return host and port of each key of ``config`` that is a listening address."""
    found = {
        "router.port": (config.router.host, config.router.port),
        "router.admin_port": config.router.admin_address,
    }
    if config.registry.kind == "static":
        found["router.control"] = split_tcp_address(config.router.control)
    for node in config.nodes:
        found[f"nodes.{node.name}.port"] = (node.host, node.port)
        if node.metrics_address is not None:
            found[f"nodes.{node.name}.metrics_port"] = node.metrics_address
        for key in ("endpoint", "replay_endpoint"):
            if (address := getattr(node.kv_events, key)) is not None:
                found[f"nodes.{node.name}.kv_events.{key}"] = split_tcp_address(address)
    return found


def taken_addresses(config: ClusterConfig) -> dict[str, str]:
    """Return the keys whose address cannot be bound now, with the reason."""
    problems = {key: listen_problem(host, port) for key, (host, port) in addresses(config).items()}
    return {key: problem for key, problem in problems.items() if problem is not None}


def require_free_addresses(config: ClusterConfig) -> None:
    """Raise ConfigError with one line for each address of ``config`` that cannot be bound."""
    if taken := taken_addresses(config):
        raise ConfigError([f"{key}: {problem}" for key, problem in taken.items()])
