"""CUDA by PaddlePaddle's GPU build.

Triton takes Paddle for torch, by Paddle's torch proxy, if it is imported after a PaddleCuda is made.

What is different from torch:

- The current stream is one for all threads, so ``on`` is a lock.
- GEMMs run in the stream that was current when cuBLAS was first used. Only Triton's kernels may run in another one.
- Waiting for one of Paddle's events stops all Python threads, so events are the CUDA driver's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.errors import DeviceError
from kvrelay.kv_pool.cuda_api import DeviceWords
from kvrelay.kv_pool.cuda_driver import CudaDriver

_on_sigterm = signal.getsignal(signal.SIGTERM)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Paddle warns of a missing ccache and of its own deprecations
    import paddle
    from paddle.base import core
paddle.disable_signal_handler()  # which also resets what this process does at SIGTERM
signal.signal(signal.SIGTERM, _on_sigterm)

_HIGH_PRIORITY = 1

_stream_lock = threading.RLock()


class PaddleCuda:
    """See CudaApi."""

    # Paddle names CUDA errors OSError, and errors of arguments as Python does
    errors: tuple[type[Exception], ...] = (RuntimeError, OSError, ValueError, MemoryError, AssertionError)

    def __init__(self) -> None:
        paddle.set_device("gpu")
        self.place = paddle.framework._current_expected_place_()
        _let_triton_in()
        self.start()
        self._driver = CudaDriver()

    def start(self) -> None:
        paddle.zeros([1], dtype="int32", device=self.place)

    def release_memory(self) -> None:
        paddle.device.cuda.empty_cache()

    def stream(self) -> PaddleStream:
        return PaddleStream(paddle.device.Stream(self.place, _HIGH_PRIORITY), self._driver)

    def own_stream(self) -> PaddleStream:
        """Return the stream that Paddle computes in by itself, GEMMs included."""
        return PaddleStream(paddle.device.current_stream(self.place), self._driver)

    def event(self) -> DriverEvent:
        return DriverEvent(self._driver)

    @contextlib.contextmanager
    def on(self, stream: PaddleStream) -> Iterator[None]:
        with _stream_lock, paddle.device.stream_guard(stream.stream):
            yield

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return self.pinned_tensor(shape, dtype)[0]

    def pinned_tensor(self, shape: tuple[int, ...], dtype: type[np.generic]) -> tuple[npt.NDArray[Any], Any]:
        """Return what ``pinned`` does, and the same memory as a tensor."""
        tensor = paddle.empty(shape, dtype=np.dtype(dtype).name, device=self.place, pin_memory=True)
        num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        memory: Any = (ctypes.c_byte * num_bytes).from_address(tensor.data_ptr())
        memory.tensor = tensor  # lives as long as the array
        return np.frombuffer(memory, dtype).reshape(shape), tensor

    def tensor(self, memory: DeviceWords) -> Any:
        # Paddle 3.3 gives back one reference more than it takes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        return paddle.to_tensor(memory)


class PaddleStream:
    """A stream of Paddle's."""

    def __init__(self, stream: Any, driver: CudaDriver) -> None:
        self.stream = stream
        self.address: int = stream.stream_base.raw_stream
        self._driver = driver

    def wait_event(self, event: DriverEvent) -> None:
        """Run work that is queued from now on after ``event``."""
        self._driver.queue_wait(self.address, event.address)

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        done = DriverEvent(self._driver)
        done.record(self)
        done.synchronize()


class DriverEvent:
    """An event of the CUDA driver."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self.address = 0
        self.address = driver.create_event()

    def record(self, stream: PaddleStream) -> None:
        """Mark the end of what is queued on ``stream`` so far."""
        self._driver.record_event(self.address, stream.address)

    def query(self) -> bool:
        """Return whether the device has passed the mark."""
        return self._driver.has_passed(self.address)

    def synchronize(self) -> None:
        """Wait until the device has passed the mark."""
        self._driver.wait_for_event(self.address)

    def __del__(self) -> None:
        if self.address:
            self._driver.destroy_event(self.address)


@functools.cache
def _let_triton_in() -> None:
    """Have Triton's ``import torch`` find Paddle, and give Paddle's types what Triton asks of torch's."""
    if "triton" in sys.modules:
        raise DeviceError("Triton was imported before Paddle's torch proxy")
    paddle.compat.enable_torch_proxy(scope={"triton"}, silent=True)
    if not hasattr(core.DataType, "itemsize"):
        core.DataType.itemsize = property(core.size_of_dtype)
