"""Timelines of the last requests, for people. No decision depends on them."""

from __future__ import annotations

from collections import OrderedDict

from kvrelay.protocol.messages.base import LayerTransfer, Mark
from kvrelay.protocol.messages.node_to_router import RequestTimeline

MAX_KEPT = 256
"""How many ended requests are remembered."""

MAX_PARTS = 64
"""How many reports of nodes are kept per request: each attempt brings two."""


class Timeline:
    """Marks and layer transfers of one request, all attempts together."""

    __slots__ = ("layers", "marks", "num_parts")

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.layers: list[LayerTransfer] = []
        self.num_parts = 0

    def as_dict(self, request_id: str) -> dict[str, object]:
        """Return it in the form of ``/cluster/requests/{request_id}``: marks by time, layers by number."""
        return {
            "request_id": request_id,
            "marks": [
                {"name": mark.name, "at_s": mark.at_s, "node": mark.node}
                for mark in sorted(self.marks, key=lambda mark: mark.at_s)
            ],
            "layers": [
                {
                    "layer": layer.layer,
                    "first_sent_s": layer.first_sent_s,
                    "last_written_s": layer.last_written_s,
                    "num_bytes": layer.num_bytes,
                }
                for layer in sorted(self.layers, key=lambda layer: layer.layer)
            ],
            "kv_bytes_moved": sum(layer.num_bytes for layer in self.layers),
        }


class Timelines:
    """Timelines of the requests in flight and of the last that ended, whose nodes may still report."""

    def __init__(self) -> None:
        self._open: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()

    def open(self, request_id: str) -> None:
        """Begin the timeline of a new request."""
        self._ended.pop(request_id, None)
        self._open[request_id] = Timeline()

    def mark(self, request_id: str, name: str, now: float) -> None:
        """Note what the router did."""
        self._open[request_id].marks.append(Mark(name, now, "router"))

    def close(self, request_id: str) -> None:
        """The request has ended; forget the oldest if there are too many."""
        self._ended[request_id] = self._open.pop(request_id)
        if len(self._ended) > MAX_KEPT:
            self._ended.popitem(last=False)

    def merge(self, report: RequestTimeline) -> int:
        """Add a node's part, if the request is known; return the KV bytes it tells of that were not known yet."""
        timeline = self._find(report.request_id)
        if timeline is None or timeline.num_parts >= MAX_PARTS:
            return 0
        timeline.num_parts += 1
        timeline.marks += report.marks
        timeline.layers += report.layers
        return sum(layer.num_bytes for layer in report.layers)

    def get(self, request_id: str) -> dict[str, object] | None:
        """Return one request's timeline, or None if it is not known (any more)."""
        timeline = self._find(request_id)
        return timeline.as_dict(request_id) if timeline else None

    @property
    def num_open(self) -> int:
        """How many requests are in flight."""
        return len(self._open)

    def _find(self, request_id: str) -> Timeline | None:
        return self._open.get(request_id) or self._ended.get(request_id)
