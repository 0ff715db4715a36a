"""Counters of a messager; the names are used in its node's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Counters: TypeAlias = dict[str, float]
"""Monotonic totals by name."""

_NAMES = (
    "frames_sent",
    "bytes_sent",
    "frames_written",
    "bytes_written",
    "stale_frames",
    "duplicate_frames",
    "corrupt_frames",
    "unexpected_acks",
    "pending_signals_total",
    "transfers_done",
    "transfers_failed",
    "links_refused",
    "links_lost",
)


def new_counters(link_kinds: Iterable[str]) -> Counters:
    """Return every counter at zero, so that each is in the first report."""
    return dict.fromkeys([*_NAMES, *map(links_counter, link_kinds)], 0.0)


def links_counter(kind: str) -> str:
    """Return the name of the counter for links of ``kind``."""
    return f"links_{kind}"
