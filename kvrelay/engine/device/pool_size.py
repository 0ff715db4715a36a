"""How many KV blocks fit on a device beside the model: found by computing the largest step once, not by estimating."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.errors import ConfigError
from kvrelay.protocol.geometry import KVGeometry

BYTES_PER_GRAPH = 16 << 20
"""Set aside for each graph but the largest: its nodes. What it computes lies in the memory of the largest."""

HOST_SHARE = 0.5
"""Of the host's free memory: what a pool that is mirrored there takes at most."""


def num_blocks_that_fit(
    make_engine: Callable[[DeviceEngineLimits], DeviceEngine],
    framework: Framework,
    geometry: KVGeometry,
    limits: DeviceEngineLimits,
    share: float,
    host_bytes: Callable[[], int],
) -> int:
    """Return the blocks of a pool with which the engine of ``limits`` takes at most ``share`` of the device's memory.

    An engine with a small pool is made first; it captures its largest graphs and computes the largest step. What other
    processes have on the device counts as taken. Raises ConfigError if no sequence of ``max_model_len`` fits.
    """
    num_probed = -(-min(limits.max_num_batched_tokens, limits.max_model_len) // geometry.block_size) + 1
    probe = replace(
        limits,
        num_blocks=num_probed,
        decode_graphs=limits.decode_graphs[-1:],
        chunk_graphs=limits.chunk_graphs[-1:],
    )
    engine = make_engine(probe)
    engine.compute_largest_step()
    free, total = framework.memory()
    engine.close()
    del engine
    gc.collect()
    framework.release_memory()
    num_graphs = len(limits.decode_graphs) + len(limits.chunk_graphs)
    room = free + num_probed * geometry.block_bytes - (1 - share) * total - BYTES_PER_GRAPH * num_graphs
    if limits.mirrored:
        room = min(room, HOST_SHARE * host_bytes())
    num_blocks = int(room // geometry.block_bytes)
    if num_blocks < geometry.blocks_for(limits.max_model_len):
        raise ConfigError(
            [
                f"cache.num_blocks: auto: beside the model there is room for {max(num_blocks, 0):,} blocks of "
                f"{geometry.block_bytes:,} bytes, and a sequence of {limits.max_model_len:,} tokens needs "
                f"{geometry.blocks_for(limits.max_model_len):,}: lower model.max_model_len or "
                "scheduler.max_num_batched_tokens, or raise cache.device_memory_share"
            ]
        )
    return num_blocks


def free_host_bytes() -> int:
    """Return the host's memory that processes can still take, caches that give way included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    raise ConfigError(["cache.num_blocks: auto: /proc/meminfo has no MemAvailable"])
