"""Payload over a ZMQ IPC socket within one host."""

from __future__ import annotations

from cache_messager.links.payload import PayloadLink
from kvrelay.protocol.messages.base import LinkAddress


class Link(PayloadLink):
    """Payload over an IPC socket, to a peer on the same host."""

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the IPC address of a peer on this host."""
        return peer.ipc if peer.host_id == here else None
