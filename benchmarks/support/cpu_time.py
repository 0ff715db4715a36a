"""CPU time of processes, to the nanosecond (that of ``ps`` comes in ticks of 10 ms)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil


def cpu_s(pids: Iterable[int]) -> float:
    """Return the seconds all threads of ``pids``, other processes than this, have run so far."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def cpu_s_by_title(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Return the CPU seconds ``processes`` have used so far, by their titles, in ticks."""
    spent: dict[str, float] = {}
    for process in processes:
        title = " ".join(process.cmdline()).strip()
        times = process.cpu_times()
        spent[title] = spent.get(title, 0.0) + times.user + times.system
    return spent
