"""CPU time of processes, to the nanosecond (that of ``ps`` comes in ticks of 10 ms)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def cpu_s(pids: Iterable[int]) -> float:
    """Return the seconds all threads of ``pids``, other processes than this, have run so far."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9
