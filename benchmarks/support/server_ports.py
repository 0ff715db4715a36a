"""Free ports, below those that the kernel gives to clients: none of these takes one before its server listens."""

from __future__ import annotations

import random
import socket

_PORTS = range(20_000, 32_000)
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens at and that were not returned before."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            if port not in _given and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
                _given.add(port)
    return ports
