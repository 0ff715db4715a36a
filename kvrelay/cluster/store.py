"""``kvrelay store``: inspects the KV store of a cluster from outside its nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from kvrelay.config.cluster_config import ClusterConfig, Sections
from kvrelay.engine.geometry import node_geometry
from kvrelay.errors import ConfigError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.runtime.keys import Keys
from kvrelay.runtime.logging import progress_log
from kvstore.storage.factory import make_existing_store
from kvstore.storage.interface import KVStore, StoreStats, VerifyReport

T = TypeVar("T")

_NOT_FROM_OUTSIDE = {
    "none": "there is no KV store",
    "memory": "each node keeps its KV in its own memory, which other processes cannot read",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show_stats(config: ClusterConfig, node: str | None, console: Console) -> None:
    """Print the content of the store for the model. Raises KVRelayError if it cannot be read."""
    sections = store_sections(config, node)
    geometry, stats = _ask(sections, lambda store: store.stats())
    console.print(stats_table(stats, geometry))


def clear(config: ClusterConfig, node: str | None, console: Console) -> None:
    """Delete all KV of the model from the store."""
    _, num_blocks = _ask(store_sections(config, node), lambda store: store.clear())
    console.print(f"{num_blocks:,} blocks deleted")


def verify(config: ClusterConfig, node: str | None, console: Console) -> bool:
    """Read everything and delete corrupt blocks. Return whether there were none."""
    _, report = _ask(store_sections(config, node), lambda store: store.verify())
    console.print(verdict(report))
    return report.num_corrupt == 0


def store_sections(config: ClusterConfig, name: str | None) -> Sections:
    """Return the sections of the node ``name``, or those that all nodes share. They describe the store and the model.

    Raises ConfigError if the nodes differ and ``name`` is None, or if other processes cannot read such a store.
    """
    owners: list[Sections] = [config.node(name)] if name is not None else list(config.nodes) or [config]
    first = owners[0]
    if any(_place(owner) != _place(first) for owner in owners):
        names = ", ".join(node.name for node in config.nodes)
        raise ConfigError([f"the nodes' stores or models differ: choose a node with --node ({names})"])
    reason = _NOT_FROM_OUTSIDE.get(first.storage.backend)
    if reason is not None:
        raise ConfigError([f"storage.backend: {first.storage.backend}: {reason}"])
    return first


def stats_table(stats: StoreStats, geometry: KVGeometry) -> Table:
    """Return a table of a store's content; ``-``: the backend does not report it."""
    table = Table("backend", box=None, header_style="bold", pad_edge=False)
    for title in ("blocks", "tokens", "used", "capacity", "block size"):
        table.add_column(title, justify="right")
    table.add_column("model")
    num_tokens = None if stats.num_blocks is None else stats.num_blocks * geometry.block_size
    table.add_row(
        stats.backend,
        _count(stats.num_blocks),
        _count(num_tokens),
        _size(stats.used_bytes),
        _size(stats.capacity_bytes),
        _size(geometry.block_bytes),
        f"{geometry.model_digest[:12]} {geometry.dtype}",
    )
    return table


def verdict(report: VerifyReport) -> str:
    """Return the result of ``verify`` as text."""
    if not report.num_corrupt:
        return f"{report.num_blocks:,} blocks read, none corrupt"
    return f"{report.num_blocks:,} blocks read, {report.num_corrupt:,} corrupt and deleted"


def _place(sections: Sections) -> tuple[object, ...]:
    return sections.storage, sections.model, sections.cache.block_size, sections.cache.dtype, sections.engine


def _ask(sections: Sections, question: Callable[[KVStore], Awaitable[T]]) -> tuple[KVGeometry, T]:
    """Open the existing store. Return its geometry and the result of ``question``."""
    geometry = node_geometry(sections, progress_log("checkpoint"))

    keys = None if sections.security.keys is None else Keys.load_any(Path(sections.security.keys))

    async def answered() -> T:
        store = make_existing_store(sections.storage, geometry, Clock(), keys)
        await store.open()
        try:
            return await question(store)
        finally:
            await store.close()

    return geometry, asyncio.run(answered())


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"
