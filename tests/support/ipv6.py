"""Whether this machine has an IPv6 loopback, and a name for it alone; containers often have none."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

NAME = "six.kvrelay.test"
"""A name with no IPv4 address, for commands that begin with ``with_name``."""


def _has_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _has_loopback(), reason="nothing can listen at ::1 here: no IPv6 loopback")


def with_name(directory: Path) -> list[str]:
    """Return the beginning of a command to whose processes ``NAME`` is ``::1``: their ``/etc/hosts`` is a file there.

    Skips the test where that is not allowed.
    """
    hosts = directory / "hosts"
    hosts.write_text(f"::1 {NAME}\n{Path('/etc/hosts').read_text()}")
    mount = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(hosts)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mounts of its own for a process here, so no name that has only an IPv6 address")
    return command
