"""Times of a request on a prefill node, from the router's timelines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from kvrelay.cluster.client import ClusterClient

REPORT_TIMEOUT_S = 10.0
POLL_S = 0.1


class PMarks(NamedTuple):
    """Seconds since 1970: queued, given blocks, first token, KV all on the decode node (equal if it ended before)."""

    queued_s: float
    prefill_s: float
    first_token_s: float
    transferred_s: float


def marks_of(url: str, request_id: str) -> PMarks:
    """Return the marks of a request that has just ended. Raises KeyError if P has not reported in time."""
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    with ClusterClient(url) as client:
        while True:
            marks = client.timeline(request_id)["marks"]
            at_s = {mark["name"]: mark["at_s"] for mark in marks if mark["node"] == "p0"}
            if "first_token" in at_s or time.monotonic() > deadline_s:
                first_token_s = at_s["first_token"]
                return PMarks(at_s["queued"], at_s["prefill"], first_token_s, at_s.get("transferred", first_token_s))
            time.sleep(POLL_S)


def held_up_s(marks: Sequence[PMarks]) -> float:
    """Return for how many seconds requests were queued while P had none to compute."""
    changes = [(mark.queued_s, 1, 0) for mark in marks]
    changes += [(mark.prefill_s, -1, 1) for mark in marks]
    changes += [(mark.first_token_s, 0, -1) for mark in marks]
    total_s = last_s = 0.0
    queued = computing = 0
    for at_s, queued_change, computing_change in sorted(changes):
        if queued and not computing:
            total_s += at_s - last_s
        last_s, queued, computing = at_s, queued + queued_change, computing + computing_change
    return total_s


def mean_companions(marks: Sequence[PMarks]) -> float:
    """Return how many other requests had blocks on P when a request got its own, on average."""
    return statistics.mean(
        sum(other.prefill_s < mark.prefill_s < other.transferred_s for other in marks) for mark in marks
    )
