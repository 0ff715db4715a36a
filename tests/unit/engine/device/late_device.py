"""A device that computes as late as it may: what it is told waits until the host waits for it.

It runs on a CPU. What the host overwrites before the device has read it, or reads before it was told to wait, is wrong
at once and every time.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvrelay.engine.device.decoder import Computed, DeviceDecoder
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.framework import Event, Stream, Tensor
from kvrelay.engine.device.operations import MOST_LOGPROBS, Sampled, StepTensors
from kvrelay.engine.device.torch_framework import TorchFramework


class LateStream:
    """Work in its order, and how much of it is done."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], object]] = deque()
        self.num_told = 0
        self.num_done = 0

    def tell(self, work: Callable[[], object]) -> None:
        """Have ``work`` done some time."""
        self._work.append(work)
        self.num_told += 1

    def wait_until(self, num_done: int) -> None:
        """Do the first so many pieces of work."""
        with torch.inference_mode():
            while self.num_done < num_done:
                work = self._work.popleft()
                self.num_done += 1
                work()

    def synchronize(self) -> None:
        self.wait_until(self.num_told)


class LateEvent:
    """A place in a stream."""

    def __init__(self) -> None:
        self._stream: LateStream | None = None
        self._place = 0

    def record(self, stream: LateStream) -> None:
        self._stream, self._place = stream, stream.num_told

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.wait_until(self._place)


class LateFramework(TorchFramework):
    """``late`` once an engine has been made."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.late = False
        self._streams: list[LateStream] = []
        self._current: list[LateStream] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.do(lambda: target.copy_(source))

    def do(self, work: Callable[[], object]) -> None:
        """Do ``work`` now, or late in the current stream."""
        if self.late:
            self._current[-1].tell(work)
        else:
            work()

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self._current.append(stream)
        try:
            with torch.inference_mode():
                yield
        finally:
            self._current.pop()

    def stream(self) -> Stream:
        self._streams.append(LateStream())
        return self._streams[-1]

    def event(self) -> Event:
        return LateEvent()

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def capture(self, work: Callable[[], Any], stream: Stream) -> Any:
        return _LateGraph(work, self)


class _LateGraph:
    """Work done again, late, with its results in the same memory."""

    def __init__(self, work: Callable[[], Computed], framework: LateFramework) -> None:
        self._work = work
        self._framework = framework
        with torch.inference_mode():
            self.output = work()

    def replay(self) -> None:
        self._framework.do(lambda: put(self._work, self.output))


def put(work: Callable[[], Computed], target: Computed) -> None:
    """Do ``work`` and have what comes of it in ``target``."""
    computed = work()
    target.broken_rows.copy_(computed.broken_rows)
    if computed.sampled is not None and target.sampled is not None:
        for mine, theirs in zip(target.sampled, computed.sampled, strict=True):
            mine.copy_(theirs)


class LateOperations:
    """Operations: those that steps do outside of the decoder are done late."""

    def __init__(self, operations: Any, framework: LateFramework) -> None:
        self._operations = operations
        self._framework = framework

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def set_entries(self, *arguments: Any) -> None:
        self._framework.do(lambda: self._operations.set_entries(*arguments))

    def copy_blocks(self, *arguments: Any) -> None:
        self._framework.do(lambda: self._operations.copy_blocks(*arguments))


class LateDecoder:
    """A decoder whose results are there late, in memory that is there at once."""

    def __init__(self, decoder: DeviceDecoder, framework: LateFramework) -> None:
        self._decoder = decoder
        self._framework = framework

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def compute(
        self,
        step: StepTensors,
        pool: Any,
        on_layer: Callable[[int], None] = lambda layer: None,
        keeps_residual: bool = False,
    ) -> Computed:
        assert not keeps_residual, "no test asks for logprobs of prompts here"
        make, count, width = self._framework.zeros, step.shape.samples, 1 + MOST_LOGPROBS
        sampled = Sampled(make((count,), "int32"), make((count, width), "int32"), make((count, width), "float32"))
        result = Computed(sampled if count else None, make((step.shape.rows,), "int32"))

        self._framework.do(lambda: put(lambda: self._decoder.compute(step, pool), result))
        for layer in range(len(pool)):
            on_layer(layer)
        return result


def computes_late(engine: DeviceEngine, framework: LateFramework) -> LateStream:
    """Have ``engine`` compute late from now on; return the stream of its steps."""
    engine.launcher.decoder = LateDecoder(engine.launcher.decoder, framework)  # type: ignore[assignment]
    framework.late = True
    stream = engine.launcher.stream
    assert isinstance(stream, LateStream)
    return stream
