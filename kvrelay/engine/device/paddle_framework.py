"""The framework file for PaddlePaddle: its GPU build, or a CPU where streams are in order anyway.

What only a GPU does here has not run yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from kvrelay.engine.device.framework import Event, Graph, Stream, Tensor
from kvrelay.engine.device.in_order import DoneAgain, InOrder
from kvrelay.engine.paddle_runtime import paddle, set_num_threads
from kvrelay.errors import DeviceError, EngineError
from kvrelay.kv_pool.device_memory import DeviceMemory

if TYPE_CHECKING:
    from kvrelay.kv_pool.paddle_cuda import PaddleCuda

T = TypeVar("T")


class PaddleFramework:
    """The Framework on Paddle. ``device``: ``gpu`` for the current CUDA device, or ``cpu`` with ``threads`` threads."""

    name: Literal["torch", "paddle"] = "paddle"
    has_fp8 = False

    def __init__(self, device: str, threads: int = 1) -> None:
        self.is_gpu = device == "gpu"
        if self.is_gpu and not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
            raise EngineError("engine.device gpu: this Paddle finds no CUDA device")
        set_num_threads(threads)
        self._cuda: PaddleCuda | None = None
        self._place = paddle.CPUPlace()
        self._graph_pool = 0
        if self.is_gpu:
            self._open_gpu()

    def _open_gpu(self) -> None:
        from kvrelay.kv_pool.paddle_cuda import PaddleCuda  # noqa: PLC0415 (its torch proxy is for GPUs)

        self._cuda = PaddleCuda()
        self._place = self._cuda.place
        paddle.base.core.set_cublas_switch(False)  # float32 GEMMs without tf32
        self._graph_pool = paddle.base.core.CUDAGraph.gen_new_memory_pool_id()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return paddle.empty(shape, dtype, device=self._place)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return paddle.zeros(shape, dtype, device=self._place)

    def upload(self, array: npt.NDArray[Any], dtype: str) -> Tensor:
        return paddle.to_tensor(array, place=self._place).astype(dtype)

    def upload_to(self, target: Tensor, array: npt.NDArray[Any], dtype: str) -> None:
        bits = array.view(np.int16) if dtype == "bfloat16" else array
        stored = paddle.to_tensor(bits, place=self._place)
        target.copy_(stored.view(_dtype(dtype)).astype(target.dtype), True)

    def typed(self, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
        return tensor.reshape([-1]).view(_dtype(dtype)).view(shape)

    def staging(self, num_words: int) -> tuple[npt.NDArray[np.int32], Tensor]:
        if self._cuda is None:
            array = np.zeros(num_words, np.int32)
            return array, _shared(array)
        array, tensor = self._cuda.pinned_tensor((num_words,), np.int32)
        array[:] = 0
        return array, tensor

    def share(self, array: npt.NDArray[np.uint8]) -> Tensor:
        return _shared(array)

    def words(self, memory: DeviceMemory) -> Tensor:
        return memory.blocks.tensor() if self.is_gpu else _shared(memory.blocks.words)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, False)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: str | None = None) -> Tensor:
        product = paddle.matmul(x, weight, transpose_y=True)
        if bias is not None:
            product.add_(bias)
        return product if dtype is None else product.astype(dtype)

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        residual.add_(self.linear(x, weight, bias))

    def scaled_linear(self, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: str) -> Tensor:
        raise EngineError("Paddle multiplies no float8 with scales by row")

    def normal(self, shape: tuple[int, ...], dtype: str, deviation: float, seed: int) -> Tensor:
        paddle.seed(seed)
        return (paddle.randn(shape, "float32", device=self._place) * deviation).astype(dtype)

    def memory(self) -> tuple[int, int]:
        if not self.is_gpu:
            raise EngineError("the memory of a CPU is not the engine's to divide")
        self.synchronize()
        free, total = paddle.cuda.mem_get_info(self._place)
        return free, total

    def release_memory(self) -> None:
        if self._cuda is not None:
            self.synchronize()
            self._cuda.release_memory()

    def synchronize(self) -> None:
        if self._cuda is not None:
            try:
                paddle.device.synchronize(self._place)
            except self._cuda.errors as error:
                raise DeviceError(f"CUDA: {error}") from error

    def stream(self) -> Stream:
        """Paddle's own, since its GEMMs run in no other; see ``paddle_cuda``."""
        return InOrder() if self._cuda is None else self._cuda.own_stream()

    def event(self) -> Event:
        return InOrder() if self._cuda is None else self._cuda.event()

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return self._in_stream(stream)

    @contextlib.contextmanager
    def _in_stream(self, stream: Any) -> Iterator[None]:
        with paddle.no_grad(), contextlib.nullcontext() if self._cuda is None else self._cuda.on(stream):
            yield

    def capture(self, work: Callable[[], T], stream: Stream) -> Graph[T]:
        if not self.is_gpu:
            with self.on(stream):
                return DoneAgain(work)
        graph = paddle.device.cuda.graphs.CUDAGraph(self._place, pool_id=self._graph_pool)
        self.synchronize()
        with self.on(stream):
            graph.capture_begin()
            try:
                output = work()
            finally:
                graph.capture_end()
        return _CudaGraph(graph, output)


class _CudaGraph(Generic[T]):
    def __init__(self, graph: Any, output: T) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()


def _dtype(name: str) -> Any:
    return getattr(paddle, name)


def _shared(array: npt.NDArray[Any]) -> Tensor:
    """Return ``array`` as a tensor on the same memory."""
    return paddle.utils.dlpack.from_dlpack(array)
