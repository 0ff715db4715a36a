"""What the router's own config and checkpoint say of the nodes, so that no stranger can say it first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.checkpoint_files import read_json_object
from kvrelay.config.cluster_config import ClusterConfig, NodeConfig
from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.messages.node_to_router import Register


@dataclass(frozen=True, slots=True)
class ExpectedNode:
    """One node of the config. ``geometry``: the fields of its KV geometry that are known without its checkpoint."""

    role: str
    address: str
    geometry: Mapping[str, object] = field(default_factory=dict)

    def problem_with(self, registration: Register) -> str | None:
        """Return how ``registration``, which has this node's name, differs from the config, or None."""
        name = registration.node_id
        differences = [
            f"{key}: {value!r} != {getattr(registration.geometry, key)!r}"
            for key, value in self.geometry.items()
            if getattr(registration.geometry, key) != value
        ]
        if differences:
            return f"KV geometry differs from the router's config: {'; '.join(differences)}"
        if registration.role != self.role:
            return f"{name} is a {registration.role} node, in the router's config a {self.role} node"
        if registration.address != self.address:
            return f"{name} listens at {registration.address}, in the router's config at {self.address}"
        return None


def expected_nodes(config: ClusterConfig) -> dict[NodeId, ExpectedNode] | None:
    """Return the nodes of ``config`` that may register, or None if the registry names them instead.

    Raises CheckpointError if ``config.json`` of the checkpoint cannot be read.
    """
    if config.registry.kind != "static":
        return None
    return {
        NodeId(node.name): ExpectedNode(node.role.value, node.address, _known_geometry(node)) for node in config.nodes
    }


def _known_geometry(node: NodeConfig) -> dict[str, object]:
    """Return what is known of the node's geometry. Its digest and the type of its KV depend on more than the config."""
    known: dict[str, object] = {"block_size": node.cache.block_size}
    if node.engine.kind == "fake":
        fake = node.engine.fake
        return {
            **known,
            "num_layers": fake.num_layers,
            "num_kv_heads": fake.num_kv_heads,
            "head_dim": fake.head_dim,
            "model_digest": f"fake-{fake.vocab_size}",
        }
    model = read_json_object(Path(node.model.path) / "config.json", required=False)
    shape = {
        "num_layers": model.get("num_hidden_layers"),
        "num_kv_heads": model.get("num_key_value_heads") or model.get("num_attention_heads"),
        "head_dim": model.get("head_dim"),
        "dtype": None if node.cache.dtype == "auto" else node.cache.dtype,
    }
    return {**known, **{key: value for key, value in shape.items() if value is not None}}
