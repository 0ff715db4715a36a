"""The numbers of one step in one piece of memory on the device, copied there at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay.engine.device.framework import Framework, Tensor
from kvrelay.engine.device.operations import StepShape, StepTensors
from kvrelay.engine.device.step_slot import Int32, UploadArena, padded


class StepArrays(NamedTuple):
    """What a step buffer is to hold, on the host; ``staging`` is the memory of all of it.

    ``rows`` [4, N] (token, position, slot, table row), ``tiles`` [4, T], ``dense_tiles`` [4, U], ``pieces`` [3, P],
    ``sample_rows`` [S], ``reals`` float64 [4, S], ``numbers`` [6, S].
    """

    reals: npt.NDArray[np.float64]
    rows: Int32
    tiles: Int32
    sample_rows: Int32
    numbers: Int32
    dense_tiles: Int32
    pieces: Int32
    staging: Tensor


class StepBuffer:
    """Room on the device for a step of at most ``capacity`` and ``entries`` adjustments of logits.

    It is padded: what is not filled computes nothing. ``masks`` are not part of it: all buffers share them.
    """

    def __init__(self, framework: Framework, capacity: StepShape, entries: int, masks: Tensor) -> None:
        self._framework = framework
        self.capacity = capacity
        self.entries = entries
        self._masks = masks
        self._widths = _Widths(*(padded(size) for size in capacity))
        sizes = self._widths.words()
        self.num_words = sum(sizes.values())
        self._device = framework.zeros((self.num_words,), "int32")
        places = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self._places = {name: slice(at, at + sizes[name]) for name, at in places.items()}
        self._adjusted_tokens = framework.zeros((padded(entries),), "int32")
        self._changes = framework.zeros((3, padded(entries)), "float32")

    def stage(self, arena: UploadArena) -> StepArrays:
        """Return arrays of padding to fill."""
        words, staging = arena.take(self.num_words)
        parts = {name: words[place] for name, place in self._places.items()}
        reals = parts["reals"].view(np.float64).reshape(4, -1)
        rows, numbers = parts["rows"].reshape(4, -1), parts["numbers"].reshape(6, -1)
        words[:] = 0
        rows[2:] = -1  # slots and table rows
        numbers[[1, 2, 5]] = -1  # number of logprobs, row of the last tokens, mask
        return StepArrays(
            reals=reals,
            rows=rows,
            tiles=parts["tiles"].reshape(4, -1),
            sample_rows=parts["sample_rows"],
            numbers=numbers,
            dense_tiles=parts["dense_tiles"].reshape(4, -1),
            pieces=parts["pieces"].reshape(3, -1),
            staging=staging,
        )

    def upload(self, arrays: StepArrays) -> None:
        """Start the copy of what ``arrays`` hold."""
        self._framework.copy(self._device, arrays.staging)

    def upload_adjustments(self, arena: UploadArena, tokens: Int32, changes: npt.NDArray[np.float32]) -> None:
        """Have ``tokens`` [count] and ``changes`` [3, count] on the device; at most ``entries``."""
        count = len(tokens)
        arena.copy_to(self._adjusted_tokens[:count], tokens)
        for mine, values in zip(self._changes, changes, strict=True):
            arena.copy_to(mine[:count], values)

    def tensors(self, shape: StepShape) -> StepTensors:
        """Return the first part of each array, for a step of ``shape``, on the device."""
        rows, _, tiles, samples, dense, pieces = shape
        parts = {name: self._device[place] for name, place in self._places.items()}
        tokens, positions, slots, table_rows = (row[:rows] for row in parts["rows"].view(4, -1))
        return StepTensors(
            shape=shape,
            tokens=tokens,
            positions=positions,
            slots=slots,
            table_rows=table_rows,
            tiles=parts["tiles"].view(4, -1)[:, :tiles],
            sample_rows=parts["sample_rows"][:samples],
            reals=self._framework.typed(parts["reals"], "float64", (4, -1)),
            numbers=parts["numbers"].view(6, -1),
            dense_tiles=parts["dense_tiles"].view(4, -1)[:, :dense],
            pieces=parts["pieces"].view(3, -1)[:, :pieces],
            adjusted_tokens=self._adjusted_tokens,
            changes=self._changes,
            masks=self._masks,
        )


class _Widths(NamedTuple):
    """A StepShape, padded."""

    rows: int
    decodes: int
    tiles: int
    samples: int
    dense: int
    pieces: int

    def words(self) -> dict[str, int]:
        """Return the words of each part, in their order."""
        return {
            "reals": 8 * self.samples,
            "rows": 4 * self.rows,
            "tiles": 4 * self.tiles,
            "sample_rows": self.samples,
            "numbers": 6 * self.samples,
            "dense_tiles": 4 * self.dense,
            "pieces": 3 * self.pieces,
        }


def fits(shape: StepShape, capacity: StepShape) -> bool:
    """Return whether a step of ``shape`` fits ``capacity``: a graph's step, or a buffer."""
    return all(size <= most for size, most in zip(shape, capacity, strict=True))
