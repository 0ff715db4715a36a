"""Processes stopped on purpose: the part of ``faults`` that only their supervisor can do."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from kvrelay.cluster.child import Child
from kvrelay.config.faults import FaultsConfig


async def stop_now_and_then(
    child: Child,
    name: str,
    faults: FaultsConfig,
    say: Callable[[str], None],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Stop ``child`` (SIGSTOP) at random times and let it continue (SIGCONT), until cancelled."""
    if faults.stop_every_s is None:
        return
    rng = random.Random(f"{faults.seed} {name}")
    while True:
        await sleep(rng.expovariate(1 / faults.stop_every_s))
        say(f"faults: {name} is stopped for {faults.stop_s:g} s")
        child.pause()
        try:
            await sleep(faults.stop_s)
        finally:
            child.resume()
