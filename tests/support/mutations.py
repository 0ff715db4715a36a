"""Inputs that nobody sends on purpose: examples that are cut, spliced, repeated, nested, and given wrong values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

MAX_BYTES = 64 << 10
"""Longest input. Each decoder's limits on length have tests of their own."""

LONG = (300, 3000, 30_000)
"""How deep values are nested, and how often they are repeated."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, "", "x", "0", "é\0", [], {}, [[]], [{}], {"": None}, [None, 1, "x"]),
    *(2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, -0.0, 1e-320),
    *(float("inf"), float("-inf"), float("nan"), "x" * 5000, "../../etc/passwd", "%s%n{0}"),
)
"""What takes the place of a value. Those below only where the notation can say them."""

_ONLY_JSON: tuple[Any, ...] = (10**30, -(10**400), "\ud800", "\udfff\ud800x")
_ONLY_MSGPACK: tuple[Any, ...] = (b"", b"\xff" * 40, msgpack.Timestamp(1), {1: 2}, {b"x": 1})

_LENGTHS = [
    number.to_bytes(size, order, signed=False)
    for size, numbers in ((4, (0, 2**31 - 1, 2**32 - 1)), (8, (0, 1 << 31, 2**63 - 1, 2**64 - 1)))
    for number in numbers
    for order in ("little", "big")
]


class Notation(NamedTuple):
    """How structured data is written: ``write(read(data))`` is the same. ``values``: what it can say beyond VALUES."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    values: tuple[Any, ...]
    deep: tuple[bytes, bytes]
    """What opens and closes a list of one item."""


JSON = Notation(json.loads, lambda value: json.dumps(value).encode(), _ONLY_JSON, (b"[", b"]"))
MSGPACK = Notation(
    lambda data: msgpack.unpackb(data, strict_map_key=False), msgpack.packb, _ONLY_MSGPACK, (b"\x91", b"")
)


class Mutator:
    """Makes inputs of ``examples``, the same for the same ``rng``. ``words``: what is put anywhere into a text."""

    def __init__(
        self, rng: random.Random, examples: Sequence[bytes], notation: Notation | None, words: Sequence[bytes] = ()
    ) -> None:
        self._rng = rng
        self._examples = examples
        self._notation = notation
        self._words = words

    def next(self) -> bytes:
        """Return one input."""
        data = self._rng.choice(self._examples)
        if self._notation is not None and self._rng.random() < 0.6:
            data = self._structured(data, self._notation)
            if self._rng.random() < 0.7:
                return data[:MAX_BYTES]
        for _ in range(self._rng.choice((1, 1, 1, 2, 3, 8))):
            data = self._rng.choice(_OF_BYTES)(self, data)[:MAX_BYTES]
        return data

    # ------------------------------------------------------------ bytes

    def _span(self, data: bytes) -> tuple[int, int]:
        start = self._rng.randint(0, len(data))
        return start, min(len(data), start + self._rng.choice((1, 1, 2, 4, 16, 300)))

    def _cut(self, data: bytes) -> bytes:
        return data[: self._rng.randint(0, len(data))]

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\0")
        changed[self._rng.randrange(len(changed))] ^= self._rng.choice((1, 2, 16, 128, self._rng.randint(1, 255)))
        return bytes(changed)

    def _drop(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def _repeat(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[start:end] * self._rng.choice((2, 3, *LONG)) + data[end:]

    def _insert(self, data: bytes) -> bytes:
        at = self._rng.randint(0, len(data))
        word = self._rng.choice(self._words) if self._words and self._rng.random() < 0.8 else self._rng.randbytes(4)
        return data[:at] + word + data[at:]

    def _splice(self, data: bytes) -> bytes:
        other = self._rng.choice(self._examples)
        return data[: self._rng.randint(0, len(data))] + other[self._rng.randint(0, len(other)) :]

    def _length(self, data: bytes) -> bytes:
        word, at = self._rng.choice(_LENGTHS), self._rng.choice((0, self._rng.randint(0, len(data))))
        return data[:at] + word + data[at + len(word) :]

    # ------------------------------------------------------------ structure

    def _structured(self, data: bytes, notation: Notation) -> bytes:
        """Return ``data`` with one value inside exchanged, left out, repeated, or nested."""
        if self._rng.random() < 0.05:
            depth, (opening, closing) = self._rng.choice(LONG), notation.deep
            return opening * depth + data + closing * depth
        root: Any = [notation.read(data)]
        for _ in range(self._rng.choice((1, 1, 2, 4))):
            holder, key = self._place(root)
            if isinstance(holder, dict) and self._rng.random() < 0.15:
                del holder[key]
            elif isinstance(holder[key], list) and holder[key] and self._rng.random() < 0.3:
                most = max(2, MAX_BYTES // len(repr(holder[key])))
                holder[key] = holder[key] * min(most, self._rng.choice((2, *LONG)))
            elif self._rng.random() < 0.05:
                holder[key] = self._nested(holder[key])
            else:
                holder[key] = copy.deepcopy(self._rng.choice((*VALUES, *notation.values)))
        try:
            return notation.write(root[0])
        except (RecursionError, ValueError):  # deeper than it can be written
            return data

    def _place(self, root: list[Any]) -> tuple[Any, Any]:
        """Return a list or dict inside ``root`` and one of its keys."""
        holder: Any = root
        key: Any = 0
        while isinstance(inner := holder[key], dict | list) and inner and self._rng.random() < 0.8:
            holder = inner
            key = self._rng.choice(list(inner)) if isinstance(inner, dict) else self._rng.randrange(len(inner))
        return holder, key

    def _nested(self, value: Any) -> Any:
        for _ in range(self._rng.choice((3, 100, 450))):
            value = [value] if self._rng.random() < 0.5 else {"x": value}
        return value


_OF_BYTES: tuple[Callable[[Mutator, bytes], bytes], ...] = (
    Mutator._cut,
    Mutator._flip,
    Mutator._flip,
    Mutator._drop,
    Mutator._repeat,
    Mutator._insert,
    Mutator._insert,
    Mutator._splice,
    Mutator._length,
)
