"""The router's counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Monotonic totals since the process started. All but the last few count requests."""

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    attempts: int = 0
    retries: int = 0
    moved: int = 0
    local_prefills: int = 0
    decode_refusals: int = 0
    stale_messages: int = 0
    nodes_lost: int = 0
    registrations_refused: int = 0
    kv_bytes_moved: int = 0
    refused_for_ttft: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return all counters by name."""
        return asdict(self)
