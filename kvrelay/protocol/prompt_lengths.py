"""Classes of prompts by length: what nodes report and routers read is per class."""

from __future__ import annotations

from bisect import bisect_left

LENGTH_BOUNDS = (128, 512, 2048, 8192)
"""The longest prompt of each class, in tokens; the last class has no bound."""

NUM_LENGTH_CLASSES = len(LENGTH_BOUNDS) + 1

LENGTH_NAMES = (*(f"<={bound}" for bound in LENGTH_BOUNDS), f">{LENGTH_BOUNDS[-1]}")
"""How each class is called in metrics."""


def length_class(num_tokens: int) -> int:
    """Return the class of a prompt of ``num_tokens``, from 0."""
    return bisect_left(LENGTH_BOUNDS, num_tokens)
