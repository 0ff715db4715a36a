"""The framework file for torch: CUDA, or a CPU where streams are in order anyway and a graph is its work done again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.engine.device.framework import Event, Graph, Stream, Tensor
from kvrelay.engine.device.in_order import DoneAgain, InOrder
from kvrelay.errors import DeviceError, EngineError
from kvrelay.kv_pool.device_memory import DeviceMemory

T = TypeVar("T")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
}


class TorchFramework:
    """The Framework on torch. ``device``: ``gpu`` for the current CUDA device, or ``cpu`` with ``threads`` threads."""

    name: Literal["torch", "paddle"] = "torch"

    def __init__(self, device: str, threads: int = 1) -> None:
        self.is_gpu = device == "gpu"
        if self.is_gpu and not torch.cuda.is_available():
            raise EngineError("engine.device gpu: torch finds no CUDA device")
        self._device = torch.device("cuda", torch.cuda.current_device()) if self.is_gpu else torch.device("cpu")
        torch.set_num_threads(threads)
        self._graph_pool = torch.cuda.graph_pool_handle() if self.is_gpu else None
        self.has_fp8 = not self.is_gpu or torch.cuda.get_device_capability(self._device) >= (8, 9)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[dtype], device=self._device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.zeros(shape, dtype=DTYPES[dtype], device=self._device)

    def upload(self, array: npt.NDArray[Any], dtype: str) -> Tensor:
        owned = array if array.flags.writeable else array.copy()
        return torch.from_numpy(np.ascontiguousarray(owned)).to(self._device, DTYPES[dtype], copy=True)

    def upload_to(self, target: Tensor, array: npt.NDArray[Any], dtype: str) -> None:
        bits = array.view(np.int16) if dtype == "bfloat16" else array
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            stored = torch.from_numpy(bits)
        # to the device first: a copy that is also a conversion would convert on the host
        target.copy_(stored.view(DTYPES[dtype]).to(self._device))

    def typed(self, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
        return tensor.reshape(-1).view(DTYPES[dtype]).view(shape)

    def staging(self, num_words: int) -> tuple[npt.NDArray[np.int32], Tensor]:
        memory = torch.zeros(num_words, dtype=torch.int32, pin_memory=self.is_gpu)
        return memory.numpy(), memory

    def share(self, array: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(array)

    def words(self, memory: DeviceMemory) -> Tensor:
        return memory.blocks.tensor() if self.is_gpu else torch.from_numpy(memory.blocks.words)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: str | None = None) -> Tensor:
        if bias is not None:
            return torch.addmm(bias, x, weight.t())
        if dtype is None or DTYPES[dtype] == x.dtype:
            return torch.mm(x, weight.t())
        if self.is_gpu:
            return torch.mm(x, weight.t(), out_dtype=DTYPES[dtype])
        return torch.mm(x, weight.t()).to(DTYPES[dtype])

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if bias is not None:
            residual.add_(bias)
        residual.addmm_(x, weight.t())

    def scaled_linear(self, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: str) -> Tensor:
        if self.is_gpu:
            # sums in float32 throughout: the fast ones of Hopper keep fewer bits
            return torch._scaled_mm(
                x, weight.t(), x_scales, weight_scales.t(), out_dtype=DTYPES[dtype], use_fast_accum=False
            )
        return (torch.mm(x.float(), weight.float().t()) * x_scales * weight_scales.t()).to(DTYPES[dtype])

    def normal(self, shape: tuple[int, ...], dtype: str, deviation: float, seed: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(seed)
        empty = torch.empty(shape, dtype=DTYPES[dtype], device=self._device)
        return empty.normal_(0.0, deviation, generator=generator)

    def memory(self) -> tuple[int, int]:
        if not self.is_gpu:
            raise EngineError("the memory of a CPU is not the engine's to divide")
        self.synchronize()
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    def release_memory(self) -> None:
        if self.is_gpu:
            self.synchronize()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.is_gpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceError(f"CUDA: {error}") from error

    def stream(self) -> Stream:
        return torch.cuda.Stream(self._device) if self.is_gpu else InOrder()

    def event(self) -> Event:
        return torch.cuda.Event() if self.is_gpu else InOrder()

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return self._in_stream(stream)

    @contextlib.contextmanager
    def _in_stream(self, stream: Any) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(stream) if self.is_gpu else contextlib.nullcontext():
            yield

    def capture(self, work: Callable[[], T], stream: Stream) -> Graph[T]:
        if not self.is_gpu:
            with torch.inference_mode():
                return DoneAgain(work)
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self._graph_pool, stream=stream):
            output = work()
        return _CudaGraph(graph, output)


class _CudaGraph(Generic[T]):
    def __init__(self, graph: torch.cuda.CUDAGraph, output: T) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()
