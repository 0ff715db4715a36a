"""Runs a decode node or a mixed node."""

from __future__ import annotations

from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.node.service import run_node
from kvrelay.protocol.messages.node_to_router import Register


def run(config: ClusterConfig, node_name: str) -> int:
    """Serve as the node called ``node_name``; return the process's exit status."""
    node = config.node(node_name)

    def make_machine(registration: Register, max_plans_in_flight: int) -> DecodeMachine:
        return DecodeMachine(node, registration, max_plans_in_flight)

    return run_node(node, make_machine, layer_events=False)
