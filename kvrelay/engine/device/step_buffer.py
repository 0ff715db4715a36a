"""The numbers of one step in one piece of memory: filled on the host, copied to the device at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.operations import StepShape, StepTensors

_ALIGNMENT = 4
"""Words: Triton compiles anew for an address that is not a multiple of 16 bytes."""


class StepBuffer:
    """Room for a step of at most ``capacity`` and ``entries`` adjustments of logits, as host arrays and on the device.

    Host arrays by name: ``rows`` [4, N] (token, position, slot, table row), ``tiles`` [4, T], ``dense_tiles`` [4, U],
    ``pieces`` [3, P], ``sample_rows`` [S], ``reals`` float64 [4, S], ``numbers`` [5, S]. They are padded: what is not
    filled computes nothing.
    """

    def __init__(self, framework: Framework, capacity: StepShape, entries: int) -> None:
        self._framework = framework
        self.capacity = capacity
        self.entries = entries
        rows, _, tiles, samples, dense, pieces = (_padded(size) for size in capacity)
        sizes = {"reals": 8 * samples, "rows": 4 * rows, "tiles": 4 * tiles, "sample_rows": samples}
        sizes |= {"numbers": 5 * samples, "dense_tiles": 4 * dense, "pieces": 3 * pieces}
        host, self._staging = framework.staging(sum(sizes.values()))
        self._device = framework.zeros((len(host),), "int32")
        places = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self._parts = {name: self._device[at : at + sizes[name]] for name, at in places.items()}
        parts = {name: host[at : at + sizes[name]] for name, at in places.items()}
        self.rows, self.tiles = parts["rows"].reshape(4, rows), parts["tiles"].reshape(4, tiles)
        self.dense_tiles, self.pieces = parts["dense_tiles"].reshape(4, dense), parts["pieces"].reshape(3, pieces)
        self.sample_rows, self.numbers = parts["sample_rows"], parts["numbers"].reshape(5, samples)
        self.reals: npt.NDArray[np.float64] = parts["reals"].view(np.float64).reshape(4, samples)
        self._adjusted_tokens = framework.zeros((_padded(entries),), "int32")
        self._changes = framework.zeros((3, _padded(entries)), "float32")
        self.reset()

    def reset(self) -> None:
        """Make everything padding."""
        self.rows[0], self.rows[1], self.rows[2], self.rows[3] = 0, 0, -1, -1
        self.tiles[:], self.dense_tiles[:], self.pieces[:] = 0, 0, 0
        self.sample_rows[:] = 0
        self.reals[:] = 0.0
        self.numbers[0], self.numbers[1], self.numbers[2], self.numbers[3], self.numbers[4] = 0, -1, -1, 0, 0

    def upload(self) -> None:
        """Start the copy of what the host arrays hold."""
        self._framework.copy(self._device, self._staging)

    def upload_adjustments(self, tokens: npt.NDArray[np.int32], changes: npt.NDArray[np.float32]) -> None:
        """Have ``tokens`` [count] and ``changes`` [3, count] on the device; at most ``entries``."""
        count, make = len(tokens), self._framework
        make.copy(self._adjusted_tokens[:count], make.upload(tokens, "int32"))
        for mine, values in zip(self._changes, changes, strict=True):
            make.copy(mine[:count], make.upload(values, "float32"))

    def tensors(self, shape: StepShape) -> StepTensors:
        """Return the first part of each array, for a step of ``shape``, on the device."""
        rows, _, tiles, samples, dense, pieces = shape
        parts = self._parts
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
            numbers=parts["numbers"].view(5, -1),
            dense_tiles=parts["dense_tiles"].view(4, -1)[:, :dense],
            pieces=parts["pieces"].view(3, -1)[:, :pieces],
            adjusted_tokens=self._adjusted_tokens,
            changes=self._changes,
        )


def fits(shape: StepShape, capacity: StepShape) -> bool:
    """Return whether a step of ``shape`` fits ``capacity``: a graph's step, or a buffer."""
    return all(size <= most for size, most in zip(shape, capacity, strict=True))


def _padded(size: int) -> int:
    return max(_ALIGNMENT, size + -size % _ALIGNMENT)
