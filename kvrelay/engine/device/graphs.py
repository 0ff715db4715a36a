"""Captures whole steps as graphs, one for each common size: one launch instead of several hundred."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.engine.device.decoder import Computed, DeviceDecoder
from kvrelay.engine.device.framework import Framework, Graph, Stream, Tensor
from kvrelay.engine.device.operations import StepShape
from kvrelay.engine.device.step_buffer import StepBuffer, fits
from kvrelay.engine.device.step_slot import UploadArena
from kvrelay.engine.kernels import LayerKV

ADJUSTMENTS_PER_ROW = 4096
"""Adjusted logits that a graph has room for, by row; a step with more of them is computed without one."""

SAMPLES_OF_CHUNKS = 8

_DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return of how many sequences decode steps are graphs, so that a step of up to so many wastes little."""
    return *(size for size in _DECODE_SIZES if size < max_num_seqs), max_num_seqs


def chunk_shapes(sizes: Sequence[int], tile_rows: int) -> list[StepShape]:
    """Return shapes of prefill steps of up to so many tokens each, of a few sequences."""
    return [StepShape(size, 0, -(-size // tile_rows) + SAMPLES_OF_CHUNKS, SAMPLES_OF_CHUNKS) for size in sizes]


class StepGraph:
    """A captured step of at most ``shape`` with the buffer that it reads."""

    def __init__(
        self, shape: StepShape, decoder: DeviceDecoder, pool: Sequence[LayerKV], masks: Tensor, framework: Framework,
        stream: Stream, arena: UploadArena,
    ) -> None:  # fmt: skip
        with framework.on(stream):
            self.buffer = StepBuffer(framework, shape, ADJUSTMENTS_PER_ROW * shape.samples, masks)
            step = self.buffer.tensors(shape)

        def work() -> Computed:
            return decoder.compute(step, pool)

        with framework.on(stream):
            self.buffer.upload(self.buffer.stage(arena))
            work()  # compiles what it needs
        stream.synchronize()
        arena.clear()
        self._graph: Graph[Computed] = framework.capture(work, stream)

    def replay(self) -> Computed:
        """Compute the content of the buffer. Results are in the same memory each time."""
        self._graph.replay()
        return self._graph.output


class StepGraphs:
    """All graphs of an engine, captured the largest first: the others fit into the memory of that one."""

    def __init__(
        self,
        shapes: Sequence[StepShape],
        decoder: DeviceDecoder,
        pool: Sequence[LayerKV],
        masks: Tensor,
        framework: Framework,
        stream: Stream,
        arena: UploadArena,
    ) -> None:
        ordered = sorted(shapes, key=lambda shape: shape.rows * max(shape.samples, 1), reverse=True)
        self._graphs = [StepGraph(shape, decoder, pool, masks, framework, stream, arena) for shape in ordered]
        self._graphs.sort(key=lambda graph: graph.buffer.capacity.rows)

    def find(self, shape: StepShape, num_adjustments: int) -> StepGraph | None:
        """Return the smallest graph that computes a step of ``shape``, or None."""
        for graph in self._graphs:
            if fits(shape, graph.buffer.capacity) and num_adjustments <= graph.buffer.entries:
                return graph
        return None
