"""Names of workers."""

from __future__ import annotations


def name_of(index: int) -> str:
    """Return the name of a worker in logs and for operators."""
    return f"router-{index}"
