"""Classes of prompts by length, for the load reports of nodes."""

from __future__ import annotations

from bisect import bisect_left

LENGTH_BOUNDS = (128, 512, 2048, 8192)
"""Maximum prompt length of each class, in tokens. The last class has no bound."""

NUM_LENGTH_CLASSES = len(LENGTH_BOUNDS) + 1

LENGTH_NAMES = (*(f"<={bound}" for bound in LENGTH_BOUNDS), f">{LENGTH_BOUNDS[-1]}")
"""Names of the classes in metrics."""


def length_class(num_tokens: int) -> int:
    """Return the class of a prompt of ``num_tokens``, from 0."""
    return bisect_left(LENGTH_BOUNDS, num_tokens)
