"""What holds for every test of the router: no request may hold its event loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.loop_stalls import MAX_STALL_S, LoopStalls, watching_for_stalls


@pytest.fixture(autouse=True)
def no_stalls() -> Iterator[LoopStalls]:
    """Fail a test in which something of the router held the event loop for longer than it may."""
    with watching_for_stalls() as stalls:
        yield stalls
    if stalls.found:
        pytest.fail(f"held the loop for over {MAX_STALL_S * 1000:.0f} ms: " + "; ".join(stalls.found), pytrace=False)
