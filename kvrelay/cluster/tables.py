"""Tables for a terminal: the status of a cluster, the timeline of a request."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrelay.printable import printable

_STATE_STYLES = {"ready": "green", "draining": "yellow"}
_LOAD_COLUMNS = {
    "run": "num_running",
    "wait": "num_waiting",
    "recv": "num_receiving",
    "send": "num_sending",
    "used": "used_blocks",
    "cached": "evictable_blocks",
    "free": "free_blocks",
}
"""Column titles and fields of a node's load: requests by state, blocks by use."""

_NOT_OF_REQUESTS = frozenset({"self_checks"})
"""Counters that are normal, and say nothing of requests."""


def status_tables(status: dict[str, Any]) -> Group:
    """Return the status of a cluster: the nodes, the router's workers if it has several, a line about requests."""
    workers = status.get("http_workers")  # clients are not told
    parts: list[RenderableType] = [nodes_table(status)]
    if workers:
        parts += [Text(), _workers_table(workers)]
    return Group(*parts, Text(), _requests_line(status.get("requests", {})))


def nodes_table(status: dict[str, Any]) -> Table:
    """Return a table of the nodes, with their requests and blocks, and of those that should be there."""
    table = Table("node", "role", "state", "address", box=None, header_style="bold", pad_edge=False)
    for title in _LOAD_COLUMNS:
        table.add_column(title, justify="right")
    for node in sorted(status.get("nodes", []), key=lambda node: str(node["name"])):
        load = node.get("load") or {}
        heard = any(load.get(field) for field in ("used_blocks", "evictable_blocks", "free_blocks"))
        state = Text(printable(str(node["state"])), _STATE_STYLES.get(node["state"], "red"))
        address = str(node.get("address", "-")).removeprefix("tcp://")  # clients are not told
        counts = (f"{load[field]:g}" if heard else "-" for field in _LOAD_COLUMNS.values())
        table.add_row(node["name"], node["role"], state, address, *counts)
    for node in status.get("missing_nodes", []):
        table.add_row(node["name"], node["role"], Text("missing", "red"), *"-" * (1 + len(_LOAD_COLUMNS)))
    return table


def _workers_table(workers: list[dict[str, Any]]) -> Table:
    table = Table("worker", "pid", "requests", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for worker in workers:
        table.add_row(worker["name"], str(worker["pid"]), str(worker["num_requests"]))
    return table


def timeline_table(timeline: dict[str, Any]) -> Table:
    """Return a table of one request's timeline, with the transfer of each layer."""
    table = Table("ms", "where", "what", box=None, header_style="bold", pad_edge=False)
    table.columns[0].justify = "right"
    moments = [(mark["at_s"], mark["node"], mark["name"].replace("_", " ")) for mark in timeline["marks"]]
    for layer in timeline["layers"]:
        took_ms = 1000 * (layer["last_written_s"] - layer["first_sent_s"])
        what = f"layer {layer['layer']}: {layer['num_bytes']:,} bytes of KV sent, written {took_ms:.1f} ms later"
        moments.append((layer["first_sent_s"], "transfer", what))
    moments.sort(key=lambda moment: moment[0])
    for at_s, where, what in moments:
        table.add_row(f"{1000 * (at_s - moments[0][0]):.1f}", where, what)
    return table


def _requests_line(requests: dict[str, Any]) -> str:
    shown = {name: value for name, value in requests.items() if value and name not in _NOT_OF_REQUESTS}
    counts = [f"{name.replace('_', ' ')} {value:,.0f}" for name, value in shown.items()]
    return "requests: " + (", ".join(counts) or "none yet")
