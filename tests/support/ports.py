"""Free ports. Test runs at the same time on one machine get ports from different ranges."""

from __future__ import annotations

import atexit
import functools
import itertools
import random
import socket
from collections.abc import Iterator

_FIRST, _END = 10_000, 20_000
"""Below the range that the kernel gives to clients, also 10,000 higher, where a node of a Redis cluster listens too."""

_PORTS_PER_RUN = 500


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at.

    All ports of this run's range come once before one comes again: what has been returned may not be in use yet.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = next(_ports_in_turn())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


@functools.cache
def _ports_in_turn() -> Iterator[int]:
    ports = list(_range_of_this_run())
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


@functools.cache
def _range_of_this_run() -> range:
    """Return ports that no other run on this machine uses while this process lives.

    A name in the kernel's abstract namespace stands for each range: it has no file, and is free when its owner ends.
    """
    starts = list(range(_FIRST, _END, _PORTS_PER_RUN))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0kvrelay-tests-{start}")
        except OSError:
            claim.close()
            continue
        atexit.register(claim.close)
        return range(start, start + _PORTS_PER_RUN)
    raise RuntimeError(f"{len(starts)} test runs have taken all ports")


_range_of_this_run()  # before any test looks at which descriptors are open
