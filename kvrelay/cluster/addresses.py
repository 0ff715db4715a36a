"""The addresses that the processes of a cluster listen at."""

from __future__ import annotations

from kvrelay.addresses import split_tcp_address
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError
from kvrelay.runtime.listening import listen_problem


def addresses(config: ClusterConfig) -> dict[str, tuple[str, int]]:
    """Return the host and port behind each key of ``config`` that a process listens at."""
    found = {"router.port": (config.router.host, config.router.port)}
    if config.registry.kind == "static":
        found["router.control"] = split_tcp_address(config.router.control)
    return found | {f"nodes.{node.name}.port": (node.host, node.port) for node in config.nodes}


def taken_addresses(config: ClusterConfig) -> dict[str, str]:
    """Return the keys whose address nobody here could listen at now, with the reason."""
    problems = {key: listen_problem(host, port) for key, (host, port) in addresses(config).items()}
    return {key: problem for key, problem in problems.items() if problem is not None}


def require_free_addresses(config: ClusterConfig) -> None:
    """Raise ConfigError, with a line for each, if processes of this host cannot listen where ``config`` says."""
    if taken := taken_addresses(config):
        raise ConfigError([f"{key}: {problem}" for key, problem in taken.items()])
