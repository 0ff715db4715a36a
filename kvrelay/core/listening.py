"""Whether this process could listen at an address."""

from __future__ import annotations

import socket


def listen_problem(host: str, port: int) -> str | None:
    """Return why nobody could listen at ``host:port`` now, or None. Port 0 stands for any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen at {host}:{port}: {error.strerror}"
    return None
