"""Steps on a CPU for tests of operations: random ones, with block tables out of order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvrelay.engine.device.operations import OperationLimits, StepShape, StepTensors
from kvrelay.engine.device.tiles import Chunk, DenseRoom, TileCutter
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.kernels import HeadShape, LayerKV
from kvrelay.engine.rope import RopeConfig, Rotation, inverse_frequencies


@dataclass(frozen=True)
class Shape:
    """Sizes of heads and blocks of one test."""

    heads: int = 4
    groups: int = 2
    dim: int = 16
    block_size: int = 16
    dtype: str = "float32"
    max_len: int = 256

    def head_shape(self) -> HeadShape:
        rotation = Rotation(*inverse_frequencies(RopeConfig(), self.dim, self.max_len))
        return HeadShape(self.heads, self.groups, self.dim, rotation)

    def limits(self, max_num_seqs: int = 8) -> OperationLimits:
        return OperationLimits(self.dtype, self.block_size, self.max_len, max_num_seqs, gathered=4096)


@dataclass(frozen=True)
class Case:
    """Tensors of one step over ``spans`` of (positions before, new tokens); single tokens come first."""

    shape: Shape
    spans: list[tuple[int, int]]
    tile_rows: int
    seed: int = 0
    device: str = "cpu"
    room: DenseRoom | None = None

    def build(self) -> tuple[StepTensors, torch.Tensor, LayerKV]:
        """Return the step, block tables and a layer of random keys and values."""
        rng = np.random.default_rng(self.seed)
        size, width = self.shape.block_size, -(-self.shape.max_len // self.shape.block_size)
        num_blocks = width * len(self.spans) + 3
        tables = rng.permutation(num_blocks)[: width * len(self.spans)].reshape(len(self.spans), width)
        rows: list[tuple[int, int, int, int]] = []
        chunks: list[Chunk] = []
        singles = sum(count == 1 for _, count in self.spans)
        assert all(count == 1 for _, count in self.spans[:singles])
        for index, (before, count) in enumerate(self.spans):
            if index >= singles:
                chunks.append(Chunk(len(rows), count, before, index))
            for position in range(before, before + count):
                slot = int(tables[index][position // size]) * size + position % size
                rows.append((int(rng.integers(0, 50)), position, slot, index))
        by_row = torch.tensor(np.array(rows, np.int32).T.copy())
        tiles = TileCutter(self.tile_rows, self.room).cut(chunks)
        by_tile = [torch.tensor(np.ascontiguousarray(one)) for one in tiles]
        none = torch.zeros(4, dtype=torch.int32)
        paged, dense, pieces = (one.shape[1] for one in by_tile)
        shape = StepShape(len(rows), singles, paged, 0, dense, pieces)
        step = StepTensors(shape, *by_row, *by_tile, *[none] * 6)
        kv = torch.tensor(rng.standard_normal((2, num_blocks * size, self.shape.groups, self.shape.dim)))
        layer = LayerKV(*kv.to(getattr(torch, self.shape.dtype)))
        return moved(step, self.device), torch.tensor(tables.astype(np.int32)).to(self.device), to(layer, self.device)

    def random(self, *shape: int, seed: int = 1) -> torch.Tensor:
        """Return random activations."""
        values = torch.tensor(np.random.default_rng([self.seed, seed]).standard_normal(shape))
        return values.to(self.device, getattr(torch, self.shape.dtype))


def step_of_one_sequence(spans: list[tuple[int, int]], tile_rows: int, device: str = "cpu") -> StepTensors:
    """Return a step over ``spans`` of the sequence in row 0 of the block tables, for attention alone; see Case."""
    counts = [count for _, count in spans]
    firsts = np.cumsum([0, *counts])[:-1].tolist()
    singles = counts.count(1)
    chunks = [Chunk(first, count, before, 0) for first, (before, count) in zip(firsts, spans, strict=True)][singles:]
    paged = TileCutter(tile_rows, None).cut(chunks).paged
    positions = np.concatenate([np.arange(before, before + count, dtype=np.int32) for before, count in spans])
    none = torch.zeros(4, dtype=torch.int32)
    rows = torch.zeros(len(positions), dtype=torch.int32)
    shape = StepShape(len(positions), singles, paged.shape[1], 0)
    tiles = torch.tensor(np.ascontiguousarray(paged))
    step = StepTensors(shape, rows, torch.tensor(positions), rows, rows, tiles, tiles, tiles, *[none] * 6)
    return moved(step, device)


def moved(step: StepTensors, device: str) -> StepTensors:
    names = [name for name in StepTensors.__slots__ if name != "shape"]
    return StepTensors(step.shape, *(getattr(step, name).to(device) for name in names))


def to(layer: LayerKV, device: str) -> LayerKV:
    return LayerKV(layer.keys.to(device), layer.values.to(device))


def copy_of(layer: LayerKV) -> LayerKV:
    return LayerKV(layer.keys.clone(), layer.values.clone())


def operations(shape: Shape, framework: TorchFramework | None = None) -> tuple[Any, Any]:
    """Return Triton's operations, interpreted unless ``framework`` is a GPU's, and their references."""
    from kvrelay.engine.device.torch_operations import TorchOperations
    from kvrelay.engine.device.triton_operations import TritonOperations

    arguments = framework or TorchFramework("cpu"), shape.head_shape(), shape.limits()
    return TritonOperations(*arguments), TorchOperations(*arguments)


def close(ours: torch.Tensor, theirs: torch.Tensor, most: float) -> bool:
    """Whether the relative distance is at most ``most``; never for NaN."""
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return bool(distance <= most)
