"""Runs a prefill node."""

from __future__ import annotations

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.node.service import run_node
from kvrelay.protocol.messages.node_to_router import Register
from prefill_node.machine import PrefillMachine


def run(config: ClusterConfig, node_name: str) -> int:
    """Serve as the node called ``node_name``; return the process's exit status."""
    node = config.node(node_name)

    def make_machine(registration: Register, max_plans_in_flight: int) -> PrefillMachine:
        return PrefillMachine(node, registration, max_plans_in_flight)

    return run_node(node, make_machine, layer_events=True)
