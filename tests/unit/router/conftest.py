"""What holds for every test of the router: no request may hold its event loop. And a certificate."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loop_stalls import MAX_STALL_S, LoopStalls, watching_for_stalls


@pytest.fixture(autouse=True)
def no_stalls() -> Iterator[LoopStalls]:
    """Fail a test in which something of the router held the event loop for longer than it may."""
    with watching_for_stalls() as stalls:
        yield stalls
    if stalls.found:
        pytest.fail(f"held the loop for over {MAX_STALL_S * 1000:.0f} ms: " + "; ".join(stalls.found), pytrace=False)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """The files of a certificate for 127.0.0.1 and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl")
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", *options, *subject, "-out", files[0], "-keyout", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    return files
