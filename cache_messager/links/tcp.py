"""Payload over TCP."""

from __future__ import annotations

from cache_messager.links.payload import PayloadLink
from kvrelay.protocol.messages.base import LinkAddress


class Link(PayloadLink):
    """Payload over a TCP socket, to a peer anywhere."""

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the TCP address of the peer."""
        return peer.tcp
