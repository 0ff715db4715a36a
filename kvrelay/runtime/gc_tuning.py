"""Tunes Python's cyclic garbage collector for processes with many long-lived objects and few cycles."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 100_000
"""Allocations between two collections of the youngest objects; the default of 700 gives several per step."""


def tune_gc() -> None:
    """Exempt all existing objects from collection, and collect rarely.

    With a thousand running requests the default costs a scheduler as much as its own work: it walks all their token
    lists again and again and finds nothing. Call once, when the process is set up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 100)
