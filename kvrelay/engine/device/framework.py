"""The interface between a device engine and the framework that owns the device's memory.

Kernels are Triton's and know pointers and strides. A framework gives memory, GEMMs, streams, events and
graphs. A ``Tensor`` is the framework's own: Triton takes its pointer, and the engine uses ``shape``, ``view`` and
slices of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvrelay.kv_pool.device_memory import DeviceMemory

Tensor: TypeAlias = Any
"""A tensor of the framework."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Any) -> None:
        """Mark the end of the work queued on ``stream`` so far."""

    def synchronize(self) -> None:
        """Wait until the device has passed the mark."""


class Stream(Protocol):
    """Work that the device does in order."""

    def synchronize(self) -> None:
        """Wait until all of it is done."""


class Graph(Protocol, Generic[T_co]):
    """Captured work. ``output`` is what capturing it returned; after a replay it holds the replay's results."""

    @property
    def output(self) -> T_co:
        """The results, in the same memory after each replay."""

    def replay(self) -> None:
        """Run the work again on the current content of its inputs."""


class Framework(Protocol):
    """One device. ``has_fp8``: it multiplies float8.

    Data types go by the names of ``ITEM_BYTES`` in kvrelay.protocol.geometry, and int32, float64 and float8_e4m3.
    """

    name: Literal["torch", "paddle"]
    is_gpu: bool
    has_fp8: bool

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return memory on the device with undefined content."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return zeroed memory on the device."""

    def upload(self, array: npt.NDArray[Any], dtype: str) -> Tensor:
        """Return a copy of ``array`` on the device as ``dtype``."""

    def upload_to(self, target: Tensor, array: npt.NDArray[Any], dtype: str) -> None:
        """Copy ``array``, whose elements are ``dtype`` (bfloat16: their bits), to ``target`` of any type, and wait."""

    def typed(self, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Return the contiguous memory of ``tensor`` as another type and shape."""

    def staging(self, num_words: int) -> tuple[npt.NDArray[np.int32], Tensor]:
        """Return zeroed host memory that copies to the device read without waiting, as an array and as a tensor."""

    def share(self, array: npt.NDArray[np.uint8]) -> Tensor:
        """Return ``array`` as a tensor on the same memory, where the device is a CPU."""

    def words(self, memory: DeviceMemory) -> Tensor:
        """Return the blocks of a pool on this device as a tensor on the same memory, good until that is closed."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between device and staging memory, in the order of the current stream."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: str | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` for x [N, in] and weight [out, in], in ``dtype`` or that of ``x``."""

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add ``x @ weight.T + bias`` to ``residual`` [N, out] in place."""

    def scaled_linear(self, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: str) -> Tensor:
        """Return ``(x * x_scales) @ (weight * weight_scales).T`` for x [N, in] and weight [out, in] in float8.

        Scales are float32, [N, 1] and [out, 1]. Sums are float32.
        """

    def normal(self, shape: tuple[int, ...], dtype: str, deviation: float, seed: int) -> Tensor:
        """Return random numbers made on the device."""

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the device's memory that are free, and all of them.

        What is kept for reuse is not free.
        """

    def release_memory(self) -> None:
        """Give memory that is kept for reuse back to the device."""

    def synchronize(self) -> None:
        """Wait for all queued work of all streams. Raises DeviceError if the device is broken for good."""

    def stream(self) -> Stream:
        """Return the stream for the engine's work, which does not wait for those of pools."""

    def event(self) -> Event:
        """Return a new event."""

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Return a context in which work is queued on ``stream``, without gradients."""

    def capture(self, work: Callable[[], T], stream: Stream) -> Graph[T]:
        """Return ``work`` as a graph. It has run before, so that all it needs is compiled."""
