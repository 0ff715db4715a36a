"""What the parts share: the device, its clock, the limits that were measured and the shapes of models."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from gpu_check.report import Report
from kvrelay.engine.decoder_config import DecoderConfig, parse_decoder_config
from kvrelay.engine.device.torch_framework import DTYPES, TorchFramework
from kvrelay.engine.presets import SHAPES

_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}


class PoisonedFramework(TorchFramework):
    """Memory begins as NaN, or -7, so that what a kernel does not write is seen."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        made = super().empty(shape, dtype)
        return made.fill_(float("nan") if DTYPES[dtype].is_floating_point else -7)


class Context:
    """See the module. ``tiny``: sizes for a rehearsal."""

    def __init__(self, report: Report, device: str, tiny: bool) -> None:
        self.report = report
        self.device = device
        self.tiny = tiny
        self.patience = 10 if tiny else 1
        self.framework = TorchFramework(device, threads=4)
        self.torch_device = "cuda" if device == "gpu" else "cpu"
        self.interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.interpreted:
            from interpreting import prepare_interpreter  # noqa: PLC0415

            prepare_interpreter()
        self.copy_bytes_per_s = 3.0e12
        self.gemm_flops_per_s = 7.5e14
        self.lasting_gemm_flops_per_s = 7e14
        """Replaced by what the part ``limits`` measures."""

    def describe(self) -> None:
        """Note the machine and its software."""
        self.report.fact("python", platform.python_version())
        self.report.fact("torch", torch.__version__)
        self.report.fact("triton", triton.__version__)
        if self.device == "gpu":
            properties = torch.cuda.get_device_properties(0)
            self.report.fact("device", properties.name)
            self.report.fact("multiprocessors", properties.multi_processor_count)
            self.report.fact("memory GiB", round(properties.total_memory / 2**30, 1))
            self.report.fact("L2 MiB", round(getattr(properties, "L2_cache_size", 0) / 2**20, 1))

    def config(self, name: str) -> DecoderConfig:
        """Return a model's shape, or a tiny one of its kind."""
        data = {**SHAPES[name], "max_position_embeddings": 16384, **(_TINY if self.tiny else {})}
        if self.tiny:
            data |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        return parse_decoder_config(data)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "gpu":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
        """Return the median time of ``work`` on the device, by events around each call."""
        for _ in range(warm_up):
            work()
        self.synchronize()
        if self.device == "cpu":
            return _on_host(work)
        events = [(_event(), _event()) for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times: list[float] = [begin.elapsed_time(end) for begin, end in events]
        return statistics.median(times) / 1e3

    def seconds_in_graph(self, works: Sequence[Callable[[], object]], repeats: int = 10) -> float:
        """Return the mean time of ``works`` captured one after the other as one graph, so without launch gaps."""
        for work in works:
            work()
        self.synchronize()
        if self.device == "cpu":
            return _on_host(works[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
        return self.seconds(graph.replay, repeats, warm_up=2) / len(works)

    def mark(self, stream: Any) -> Any:
        """Return a place in ``stream`` for ``seconds_between``."""
        if self.device == "cpu":
            return time.perf_counter()
        event = _event()
        event.record(stream)
        return event

    def seconds_between(self, begin: Any, end: Any) -> float:
        """Return the device's time between two marks that it has passed."""
        seconds: float = end - begin if self.device == "cpu" else begin.elapsed_time(end) / 1e3
        return seconds

    def random(self, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers on the device."""
        values = torch.empty(shape, dtype=DTYPES[dtype], device=self.torch_device)
        return values.normal_(0.0, scale)

    def clean_up(self) -> None:
        """Give the device's memory back between parts."""
        gc.collect()
        if self.device == "gpu":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _on_host(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
