from __future__ import annotations

import subprocess
import sys

import pytest

from kvrelay.engine.paddle_runtime import _mkl_cpu_type


@pytest.mark.parametrize(
    ("cpuinfo", "cpu_type"),
    [
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", None),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f", "7"),
        ("vendor_id : AuthenticAMD\nflags : avx2", "5"),
        ("vendor_id : AuthenticAMD\nflags : sse4_2", None),
    ],
)
def test_mkl_is_told_what_other_makers_cpus_can_do(cpuinfo: str, cpu_type: str | None) -> None:
    assert _mkl_cpu_type(cpuinfo) == cpu_type


def test_the_fake_engine_and_the_loader_import_no_paddle() -> None:
    code = "import sys, kvrelay.engine.load, kvrelay.engine.tiny; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
