"""The portable kernels are for any CPU: no operator of Paddle's they use may execute AVX-512 without asking.

Paddle has such operators (its fused norms on a CPU, in 3.3). The emulated run shows that none is used; it takes a
minute and needs ``qemu-x86_64``. The list holds what has passed it, for where there is none: an operator is added when
the emulated run has passed with it. (Slices, sums and products written as Python operators are not heard of.)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
from portable_steps import steps_of_all_kinds

RUN_WITHOUT_AVX512 = {
    *("abs", "add_", "all", "cast", "clip", "concat", "embedding", "full", "gather", "isfinite", "matmul", "max"),
    *(
        "mean",
        "multiply",
        "multiply_",
        "reshape",
        "roll",
        "round",
        "rsqrt",
        "scatter_",
        "silu",
        "softmax",
        "square",
        "transpose",
    ),
    *("_has_grad", "_place", "_set_has_grad", "broadcast_shape", "from_dlpack", "get_all_custom_device_type"),
    *("is_gpu_place", "set_num_threads"),
}
"""Operators by their names in Paddle, and what is no operator but called alike."""

EMULATOR = "qemu-x86_64"
LESSER_CPU = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"


class CalledOperators:
    """The names of Paddle's operators that are called while it is entered."""

    def __enter__(self) -> set[str]:
        self.names: set[str] = set()
        sys.setprofile(self._heard)
        return self.names

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _heard(self, frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and "paddle" in str(getattr(function, "__module__", "")):
            self.names.add(getattr(function, "__name__", ""))


def test_portable_kernels_call_only_operators_that_have_run_on_a_cpu_without_avx512(tmp_path: Path) -> None:
    with CalledOperators() as called:
        steps_of_all_kinds(tmp_path)
    assert called - RUN_WITHOUT_AVX512 == set()


@pytest.mark.timeout(600)
def test_portable_kernels_compute_the_same_tokens_on_an_emulated_cpu_without_avx512(tmp_path: Path) -> None:
    emulator = shutil.which(EMULATOR)
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip(f"{EMULATOR} is not installed (Debian: qemu-user)")
    script = Path(__file__).with_name("portable_steps.py")
    command = [emulator, "-cpu", LESSER_CPU, sys.executable, str(script), str(tmp_path / "emulated")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "GLOG_v": "0"})
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    assert json.loads(done.stdout.splitlines()[-1]) == steps_of_all_kinds(tmp_path / "here")
