"""The state of the cluster for people: nodes with their load, requests by status, counters."""

from __future__ import annotations

from router.node_table import Node
from router.service import RouterService


def cluster_status(service: RouterService, *, for_operators: bool) -> dict[str, object]:
    """Return the state as JSON data. Clients do not learn where nodes are and which start of them runs."""
    machine = service.machine
    describe = _for_operators if for_operators else _for_clients
    more = {"missing_nodes": _missing(service), "http_workers": service.http_workers()} if for_operators else {}
    return {
        **more,
        "model": service.model.name,
        "ready": machine.unready_reason() is None,
        "not_ready_because": machine.unready_reason(),
        "registry": service.config.registry.kind,
        "registry_problem": machine.followed.problem,
        "nodes": [describe(node) for node in machine.node_table],
        "requests": {
            **{status.value: count for status, count in machine.requests.by_status.items()},
            **machine.counters,
        },
    }


def _missing(service: RouterService) -> list[dict[str, object]]:
    """Return the nodes of the config that are not registered; with a Redis registry the config need not know them."""
    if service.config.registry.kind != "static":
        return []
    here = {node.node_id for node in service.machine.node_table}
    return [{"name": node.name, "role": node.role.value} for node in service.config.nodes if node.name not in here]


def _for_clients(node: Node) -> dict[str, object]:
    registration = node.registration
    return {
        "name": node.node_id,
        "role": node.role.value,
        "state": "draining" if node.leaving else "ready",
        "num_requests": len(node.pending),
        "max_num_seqs": registration.max_num_seqs,
        "max_model_len": registration.max_model_len,
        "num_blocks": registration.num_blocks,
        "num_heartbeats": node.num_heartbeats,
        "load": node.load_as_dict(),
    }


def _for_operators(node: Node) -> dict[str, object]:
    registration = node.registration
    return {
        **_for_clients(node),
        "address": registration.address,
        "pid": registration.pid,
        "incarnation": registration.incarnation,
    }
