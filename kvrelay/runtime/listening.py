"""Checks whether an address can be bound."""

from __future__ import annotations

import socket

from kvrelay.addresses import netloc, resolve


def listen_problem(host: str, port: int) -> str | None:
    """Return why ``host:port`` cannot be bound now, or None."""
    try:
        family, address = resolve(host, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen at {netloc(host, port)}: {error.strerror}"
    return None
