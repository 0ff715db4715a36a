"""The registry's interface, and its creation from the config. The Redis library is imported only if needed."""

from __future__ import annotations

from typing import Protocol

from kvrelay.config.sections import RegistryConfig
from kvrelay.protocol.ids import PeerId
from kvrelay.registry.node_entry import NodeEntry


class Registry(Protocol):
    """The entries of a cluster's nodes. Every call ends within a few seconds, and raises RegistryError if it fails."""

    async def publish(self, entry: NodeEntry) -> None:
        """Write ``entry`` and renew its lease. Called by the node, several times per lease."""

    async def withdraw(self, peer: PeerId) -> None:
        """Remove the entry of ``peer``. Called by the node when it leaves."""

    async def entries(self) -> list[NodeEntry]:
        """Return the entries whose leases have not expired, without invalid ones. Called by routers periodically."""

    async def close(self) -> None:
        """Close all connections."""


def open_registry(config: RegistryConfig) -> Registry:
    """Return the registry of ``config``, whose kind must not be static. It connects when it is first used.

    Raises ConfigError for a URL that cannot be read.
    """
    from kvrelay.registry.redis_registry import RedisRegistry

    registry = RedisRegistry(config)
    registry.open()
    return registry
