"""Python's cyclic garbage collector, set for a process that holds many long-lived objects and makes few cycles."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 100_000
"""Allocations between two looks at the youngest objects; Python's default of 700 has it look several times a step."""


def tune_gc() -> None:
    """Exempt what lives now from collection, and collect seldom.

    With a thousand running requests the default costs a scheduler as much as its own work: it walks all their token
    lists again and again and finds nothing. Call once, when the process is set up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 100)
