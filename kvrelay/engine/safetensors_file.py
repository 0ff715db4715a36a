"""Reads safetensors files without a copy, and writes them tensor by tensor."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.errors import CheckpointError

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types this reads, by their names in a file."""

_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its shape, its type's name there, and its raw elements (bfloat16 as uint16)."""

    shape: tuple[int, ...]
    dtype: str
    raw: npt.NDArray[np.generic]

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32, which is exact for every supported type. Float32 data is not copied."""
        if self.dtype == "BF16":
            values = np.zeros(self.shape, np.float32)
            values.view(np.uint16)[..., 1::2] = self.raw  # bfloat16 is the upper half of float32, little-endian
            return values
        return self.raw.astype(np.float32, copy=False)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map ``path`` and return its tensors by name. Raises CheckpointError if the file is invalid."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        if len(data) < 8 or header_bytes > min(len(data) - 8, _LONGEST_HEADER_BYTES):
            raise ValueError("its header is longer than the file")
        header = json.loads(data[8 : 8 + header_bytes])
        body = memoryview(data)[8 + header_bytes :]
        return {name: _tensor(name, entry, body) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error


def _tensor(name: str, entry: Any, body: memoryview) -> StoredTensor:
    """Return the tensor that ``entry`` of the header describes. Raises ValueError if it is inconsistent."""
    match entry:
        case {"dtype": str() as dtype, "shape": [*shape], "data_offsets": [int() as start, int() as end]} if all(
            type(size) is int for size in shape
        ):
            dims = tuple(shape)
        case _:
            raise ValueError(f"{name} has no dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{name} is of type {dtype}; supported are {', '.join(_DTYPES)}")
    if min(dims, default=0) < 0 or not 0 <= start <= end <= len(body):
        raise ValueError(f"{name} lies outside of the file")
    if end - start != math.prod(dims) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - start} bytes, which is not what {dtype} {list(dims)} takes")
    raw = np.frombuffer(body[start:end], np.uint8).view(_DTYPES[dtype])
    return StoredTensor(dims, dtype, raw.reshape(dims))


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, values: Callable[[str], npt.NDArray[np.float32]]
) -> None:
    """Write tensors of ``shapes`` as ``dtype`` (``F32``, ``F16`` or ``BF16``), asking ``values`` for one at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in shapes:
            file.write(_encoded(values(name), dtype))


def _encoded(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Return ``values`` in ``dtype``, rounded to nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(_DTYPES[dtype]).tobytes()
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16).tobytes()
