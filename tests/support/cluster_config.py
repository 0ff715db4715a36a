"""Configs of clusters for tests: free ports, short heartbeats, sections by node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.ports import free_ports

VOCAB_SIZE = 384
EOS_TOKEN_ID = 2

Config = dict[str, Any]


def cluster_config(checkpoint: Path, *nodes: Mapping[str, Any], metrics: bool = False, **sections: Any) -> Config:
    """Return the config of a cluster with free ports; each of ``nodes`` has its name, role and sections.

    ``metrics``: each node has a port for its own ``/metrics`` too.
    """
    http, admin, control, *ports = free_ports(3 + 2 * len(nodes))
    of_nodes = [{"port": port} for port in ports[: len(nodes)]]
    if metrics:
        of_nodes = [{**its, "metrics_port": port} for its, port in zip(of_nodes, ports[len(nodes) :], strict=True)]
    return {
        **sections,
        "model": {"path": str(checkpoint), "served_name": "demo", **sections.get("model", {})},
        "router": {
            "port": http,
            "admin_port": admin,
            "control": f"tcp://127.0.0.1:{control}",
            **sections.get("router", {}),
        },
        "cluster": {
            "heartbeat_s": 0.1,
            "peer_timeout_s": 20.0,
            "restart_backoff_s": 0.1,
            "self_check": "fatal",
            **sections.get("cluster", {}),
        },
        "nodes": [{**node, **its} for node, its in zip(nodes, of_nodes, strict=True)],
    }


def fake_engine(**fake: Any) -> Config:
    """Return the section for an engine without a model, with the vocabulary of the tiny checkpoints."""
    return {"kind": "fake", "fake": {"vocab_size": VOCAB_SIZE, **fake}}


def p(name: str = "p0", **sections: Any) -> Config:
    """Return a prefill node."""
    return {"name": name, "role": "prefill", **sections}


def d(name: str = "d0", **sections: Any) -> Config:
    """Return a decode node."""
    return {"name": name, "role": "decode", **sections}


def m(name: str = "m0", **sections: Any) -> Config:
    """Return a mixed node."""
    return {"name": name, "role": "mixed", **sections}
