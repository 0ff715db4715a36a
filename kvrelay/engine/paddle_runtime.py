"""Imports Paddle, after setting environment variables that must be set before. No other module imports it.

Use as ``from kvrelay.engine.paddle_runtime import paddle``. Importing it takes about two seconds, so nothing outside
this package does, and ``load`` does only when the model is real.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

from kvrelay.errors import CheckpointError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30
_LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20


def _mkl_cpu_type(cpuinfo: str) -> str | None:
    """Return the instruction set that MKL should use on a CPU that is not Intel's: 7 for AVX-512, 5 for AVX2.

    The MKL inside Paddle's wheel is of 2019 and runs SSE code on other makers' CPUs: 2.5 times slower (measured:
    33 against 90 GFLOP/s on one core).
    """
    if "AuthenticAMD" not in cpuinfo:
        return None
    flags = set(cpuinfo.split())
    if "avx512f" in flags:
        return "7"
    return "5" if "avx2" in flags else None


def _choose_instruction_set() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    cpu_type = _mkl_cpu_type(cpuinfo.read_text()) if cpuinfo.exists() else None
    if cpu_type is not None:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", cpu_type)


def _keep_freed_memory() -> None:
    """Let malloc reuse the pages of freed tensors.

    By default glibc returns each buffer above 128 KiB to the kernel and faults it in again at the next operation,
    which costs up to ten times what the operation itself takes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


_choose_instruction_set()
_keep_freed_memory()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Paddle warns of a missing ccache and of its own deprecations
    import paddle

paddle.disable_signal_handler()  # its handlers would print a crash report when a node is told to stop


def set_num_threads(threads: int) -> None:
    """Compute with ``threads`` threads.

    This sets the number OpenMP and MKL use from now on. ``OMP_NUM_THREADS`` in the environment would do the same, but
    Paddle warns when it is not 1, so it is best left unset.
    """
    paddle.base.core.set_num_threads(threads)


def set_device(device: str) -> None:
    """Compute on ``device``, ``cpu`` or ``gpu``. Raises CheckpointError if this Paddle has no GPU in it."""
    if device == "gpu" and not paddle.is_compiled_with_cuda():
        raise CheckpointError("engine.device gpu needs a Paddle built for GPUs, from Paddle's own package index")
    paddle.set_device(device)


__all__ = ["paddle", "set_device", "set_num_threads"]
