"""``kvrelay trace``: timelines of requests as a trace in Chrome's JSON format, which ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvrelay.cluster.client import ClusterClient, ClusterUnreachableError
from kvrelay.errors import KVRelayError
from kvrelay.protocol.phases import ROUTER, TRANSFER, Phase, phases

_MAX_LANES = 16
"""Threads of a request in a process: phases that overlap are in different ones."""


def write_trace(cluster: ClusterClient, path: Path, request_id: str | None, count: int) -> int:
    """Write the trace of one request, or of the newest ``count``, to ``path``; return the number of requests.

    Raises KVRelayError if there is none, or ``path`` cannot be written.
    """
    timelines = list(_newest(cluster, count)) if request_id is None else [cluster.timeline(request_id)]
    if not timelines:
        raise KVRelayError("the router keeps no timeline: it has served no request since it started")
    try:
        path.write_text(json.dumps(trace_of(timelines)) + "\n")
    except OSError as error:
        raise KVRelayError(f"{path}: {error.strerror}") from error
    return len(timelines)


def _newest(cluster: ClusterClient, count: int) -> Iterator[dict[str, Any]]:
    """Yield the timelines of the newest requests. The router may drop some of them before they are asked for."""
    for item in reversed(cluster.requests(count)):
        try:
            yield cluster.timeline(item["request_id"])
        except ClusterUnreachableError:
            raise
        except KVRelayError:
            continue


def trace_of(timelines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a trace: a process for each node, the router and the transfers; threads for each request in it.

    Times are microseconds since the first mark. An arrow leads from P's hand-off to D's first decode step.
    """
    names = dict.fromkeys([ROUTER, TRANSFER])
    names |= dict.fromkeys(sorted(mark["node"] for timeline in timelines for mark in timeline["marks"]))
    pids = {name: pid for pid, name in enumerate(names, 1)}
    begin_s = min((mark["at_s"] for timeline in timelines for mark in timeline["marks"]), default=0.0)
    events = [_metadata("process_name", pid, 0, name) for name, pid in pids.items()]
    for index, timeline in enumerate(timelines):
        events += _Request(timeline, index * _MAX_LANES + 1, pids, begin_s).events()
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"begin_s": begin_s}}


class _Request:
    """The events of one request. Its threads have the numbers from ``first_thread`` on, in each process."""

    def __init__(self, timeline: dict[str, Any], first_thread: int, pids: dict[str, int], begin_s: float) -> None:
        self._timeline = timeline
        self._first_thread = first_thread
        self._pids = pids
        self._begin_s = begin_s
        self._lane_ends: dict[tuple[str, int], float] = {}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield phases, layers and marks, and the names of their threads."""
        request_id = self._timeline["request_id"]
        found = phases(self._timeline)
        for phase in found:
            yield self._span(phase, {"request_id": request_id})
        for layer in self._timeline["layers"]:
            phase = Phase(f"layer {layer['layer']}", TRANSFER, layer["first_sent_s"], layer["last_written_s"])
            yield self._span(phase, {"request_id": request_id, "bytes": layer["num_bytes"]})
        for mark in self._timeline["marks"]:
            place = {"pid": self._pids[mark["node"]], "tid": self._first_thread}
            yield {"ph": "i", "s": "t", "name": mark["name"], "cat": "mark", "ts": self._us(mark["at_s"]), **place}
            self._lane_ends.setdefault((mark["node"], 0), mark["at_s"])
        yield from self._arrow(found)
        for (node, lane), _ in sorted(self._lane_ends.items()):
            title = request_id if lane == 0 else f"{request_id} ({lane + 1})"
            yield _metadata("thread_name", self._pids[node], self._first_thread + lane, title)

    def _span(self, phase: Phase, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": phase.name,
            "cat": "phase",
            "ts": self._us(phase.start_s),
            "dur": max(0.0, phase.duration_s * 1e6),
            "pid": self._pids[phase.node],
            "tid": self._first_thread + self._lane(phase),
            "args": arguments,
        }

    def _lane(self, phase: Phase) -> int:
        """Return the first lane of the process that is free when ``phase`` begins."""
        for lane in range(_MAX_LANES):
            if self._lane_ends.get((phase.node, lane), phase.start_s) <= phase.start_s:
                self._lane_ends[phase.node, lane] = phase.end_s
                return lane
        return _MAX_LANES - 1

    def _arrow(self, found: Sequence[Phase]) -> Iterator[dict[str, Any]]:
        """Yield an arrow from the end of a prefill to the decode that follows on another node."""
        for prefill in found:
            decode = next((p for p in found if p.name == "decode" and p.start_s >= prefill.end_s), None)
            if prefill.name != "prefill" or decode is None or decode.node == prefill.node:
                continue
            arrow = {"name": "hand-off", "cat": "hand-off", "id": f"{self._timeline['request_id']}-{prefill.start_s}"}
            source = {"pid": self._pids[prefill.node], "tid": self._first_thread, "ts": self._us(prefill.end_s)}
            target = {"pid": self._pids[decode.node], "tid": self._first_thread, "ts": self._us(decode.start_s)}
            yield {"ph": "s", **arrow, **source}
            yield {"ph": "f", "bp": "e", **arrow, **target}

    def _us(self, at_s: float) -> float:
        return round((at_s - self._begin_s) * 1e6, 1)


def _metadata(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
