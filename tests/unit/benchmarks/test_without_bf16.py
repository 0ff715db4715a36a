"""Benchmarks on a CPU for which oneDNN has no bf16 GEMMs: they measure float32, or say why they do not measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # each starts Paddle anew, which a busy machine takes long for

ROOT = Path(__file__).parents[3]
LIMITS = """
import json, sys
sys.path.append("benchmarks")
from support import limits
limits.SIZE, limits.NUM_ROWS, limits.BEYOND_CACHE_BYTES, limits.ROUNDS = 64, 64, 1 << 16, 1
print(json.dumps(limits.measure_limits(1)))
"""


def run(*arguments: str, isa: str = "AVX2") -> subprocess.CompletedProcess[str]:
    """Run Python with oneDNN kept to the instructions ``isa``."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def test_limits_are_measured_in_float32() -> None:
    done = run("-c", LIMITS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith('"float32"]')


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["benchmarks/kernels.py", "--dtype", "bfloat16"], "oneDNN has no bf16 GEMMs on this CPU"),
        (["benchmarks/accuracy.py", "--no-vllm"], "this CPU has no bf16 GEMMs"),
    ],
)
def test_what_needs_bf16_says_so(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
