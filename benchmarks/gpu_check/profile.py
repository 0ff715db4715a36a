"""Which kernels the time of some work goes to, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_check.context import Context

MOST_KERNELS = 9


def report_kernels(context: Context, part: str, what: str, work: Callable[[], object]) -> None:
    """Add a row for each of the kernels that take longest in ``work``; a profiler that fails is no failure."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        times: dict[str, tuple[float, int]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                total, count = times.get(event.name, (0.0, 0))
                times[event.name] = total + event.device_time, count + 1
    except Exception as error:
        context.report.add(part, f"{what}: profile", f"failed: {repr(error)[:200]}")
        return
    ordered = sorted(times.items(), key=lambda entry: -entry[1][0])
    everything = sum(total for total, _ in times.values())
    for name, (total, count) in ordered[:MOST_KERNELS]:
        context.report.add(part, f"{what}: {name[:70]}", total, "us", None, f"{count} times")
    context.report.add(
        part, f"{what}: all kernels", everything, "us", None, f"{sum(n for _, n in times.values())} launches"
    )
