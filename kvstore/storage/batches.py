"""Splitting of sequences into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield ``items`` in order, in batches of ``size``; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
