"""Listening addresses: whether one can be bound, and a socket that the supervisor hands on."""

from __future__ import annotations

import os
import socket

from kvrelay.addresses import netloc, resolve

LISTENER_FD = "KVRELAY_LISTENER_FD"
"""Environment variable with the file descriptor of a listening socket that outlives this process."""

CONNECTION_BACKLOG = 2048
"""Length of the kernel's queue of connections to the router that it has not accepted yet."""


def inherited_listener(host: str, port: int) -> socket.socket | None:
    """Return the listening socket that this process was started with; None if there is none at ``host`` and ``port``.

    The config may have another address than when the supervisor read it. Raises OSError if ``host`` has no address.
    """
    descriptor = os.environ.pop(LISTENER_FD, None)  # it is no business of this process's children
    if descriptor is None:
        return None
    listener = socket.socket(fileno=int(descriptor))
    listener.set_inheritable(False)
    _, address = resolve(host, port)
    if listener.getsockname()[:2] == address[:2]:
        return listener
    listener.close()
    return None


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
