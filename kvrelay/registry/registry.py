"""What a registry is to nodes and routers, and from the config to one. Its library is loaded only if it is wanted."""

from __future__ import annotations

from typing import Protocol

from kvrelay.config.sections import RegistryConfig
from kvrelay.protocol.ids import PeerId
from kvrelay.registry.node_entry import NodeEntry


class Registry(Protocol):
    """The entries of a cluster's nodes. Every call ends within a few seconds, and raises RegistryError if it fails."""

    async def publish(self, entry: NodeEntry) -> None:
        """Keep ``entry`` for another lease. By the node itself, several times a lease."""

    async def withdraw(self, peer: PeerId) -> None:
        """Remove the entry of ``peer``. By the node itself, when it leaves."""

    async def entries(self) -> list[NodeEntry]:
        """Return the entries whose leases have not ended; what cannot be read is left out. By routers, all the time."""

    async def close(self) -> None:
        """Close all connections."""


def open_registry(config: RegistryConfig) -> Registry:
    """Return the registry that ``config``, whose kind is not static, describes; it is connected to when it is needed.

    Raises ConfigError for a URL that cannot be read.
    """
    from kvrelay.registry.redis_registry import RedisRegistry

    registry = RedisRegistry(config)
    registry.open()
    return registry
