"""A network of one's own: every port is free in it, whoever else uses it on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HOLD = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
print("up", flush=True)
sys.stdin.read()
"""


@contextmanager
def own_network() -> Iterator[list[str] | None]:
    """Give what goes before a command so that it runs in a network with nothing but a loopback of its own.

    None where the kernel does not let this user make one, as in many containers.
    """
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        yield None
        return
    make = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", _HOLD]
    with subprocess.Popen(
        make, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        is_up = holder.stdout.readline() == "up\n"
        try:
            yield ["nsenter", f"--target={holder.pid}", "--user", "--net", "--preserve-credentials"] if is_up else None
        finally:
            holder.stdin.close()
