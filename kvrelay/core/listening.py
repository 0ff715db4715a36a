"""Whether this process could listen at an address."""

from __future__ import annotations

import socket


def listen_problem(host: str, port: int) -> str | None:
    """Return why nobody could listen at ``host:port`` now, or None. An IPv6 address may be in brackets."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen at {host}:{port}: {error.strerror}"
    return None
