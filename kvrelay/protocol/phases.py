"""Phases of a request, from the marks of its timeline: what each process did from when to when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

TRANSFER = "transfer"
"""The phase of the KV transfer, and the name of the process that it is shown under."""

ROUTER = "router"


class Phase(NamedTuple):
    """``node`` did ``name`` from ``start_s`` to ``end_s`` (wall-clock seconds)."""

    name: str
    node: str
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Its length; below zero only if the clocks of two hosts differ."""
        return self.end_s - self.start_s


class _Rule(NamedTuple):
    name: str
    begins: frozenset[str]
    ends: frozenset[str]


def _rule(name: str, begins: str, ends: str) -> _Rule:
    return _Rule(name, frozenset(begins.split()), frozenset(ends.split()))


_ON_ROUTER = (
    _rule("request", "received", "done"),
    _rule("route", "received", "dispatched"),
    _rule("wait_first_token", "dispatched", "first_token"),
    _rule("stream", "first_token", "done"),
    _rule("preempted", "preempted", "moved done"),
)
_ON_NODES = (
    _rule("queue", "queued", "prefill load"),
    _rule("reload", "load", "loaded"),
    _rule("prefill", "prefill", "first_token decode preempted done"),
    _rule("reserve", "prefill load", "reserved"),
    _rule("send", "hand_off", "transferred"),
    _rule("receive", "reserved", "kv_arrived"),
    _rule("await_hand_off", "kv_arrived", "handed_off"),
    _rule("decode", "decode", "preempted done"),
    _rule("preempted", "preempted", "prefill load decode"),
)
NAMES = (*dict.fromkeys(rule.name for rule in (*_ON_ROUTER, *_ON_NODES)), TRANSFER)
"""All phases. ``reserve``: P computes and waits for D's blocks; ``send``: P has handed off and KV is still on its way;
``receive``: D has reserved and waits for KV; ``transfer``: from the first frame to the last block written."""


def phases(timeline: dict[str, Any]) -> list[Phase]:
    """Return the phases that have ended of ``/cluster/requests/{request_id}``, by start."""
    found = []
    marks = sorted(timeline["marks"], key=lambda mark: mark["at_s"])
    for node in dict.fromkeys(mark["node"] for mark in marks):
        moments = [(mark["name"], mark["at_s"]) for mark in marks if mark["node"] == node]
        for rule in _ON_ROUTER if node == ROUTER else _ON_NODES:
            found += [Phase(rule.name, node, start_s, end_s) for start_s, end_s in _spans(rule, moments)]
    if timeline["layers"]:
        first_s = min(layer["first_sent_s"] for layer in timeline["layers"])
        last_s = max(layer["last_written_s"] for layer in timeline["layers"])
        found.append(Phase(TRANSFER, TRANSFER, first_s, last_s))
    return sorted(found, key=lambda phase: (phase.start_s, -phase.end_s))


def hidden_share(timeline: dict[str, Any]) -> float | None:
    """Return the share of the transfer's time during which P still computed the prompt; None without a transfer."""
    found = phases(timeline)
    transfer = next((phase for phase in found if phase.name == TRANSFER), None)
    prefill_end_s = max((phase.end_s for phase in found if phase.name == "prefill"), default=None)
    if transfer is None or prefill_end_s is None or transfer.duration_s <= 0:
        return None
    return max(0.0, min(1.0, (prefill_end_s - transfer.start_s) / transfer.duration_s))


def _spans(rule: _Rule, moments: Iterable[tuple[str, float]]) -> Iterator[tuple[float, float]]:
    """Yield start and end of each time the rule's phase took place, given a node's marks in their order."""
    start_s = None
    for name, at_s in moments:
        if start_s is not None and name in rule.ends:
            yield start_s, at_s
            start_s = None
        if start_s is None and name in rule.begins:
            start_s = at_s
