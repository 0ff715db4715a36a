"""Timelines of recent requests, for operators. No decision depends on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, islice

from kvrelay.machine.histogram import Histogram
from kvrelay.protocol.histograms import STAGE_BOUNDS_S
from kvrelay.protocol.ids import ROUTER, RequestId
from kvrelay.protocol.messages.base import LayerTransfer, Mark
from kvrelay.protocol.messages.node_to_router import RequestTimeline

MAX_KEPT = 256
"""Maximum timelines of ended requests kept, unless requests are traced."""

MAX_PARTS = 64
"""Maximum node reports kept per request; each attempt adds up to two."""


class Timeline:
    """Marks and layer transfers of one request, over all attempts, the first of which has ``first_epoch`` or more."""

    __slots__ = ("first_epoch", "layers", "marks", "num_parts", "was_counted")

    def __init__(self, first_epoch: int) -> None:
        self.first_epoch = first_epoch
        self.marks: list[Mark] = []
        self.layers: list[LayerTransfer] = []
        self.num_parts = 0
        self.was_counted = False

    def inference_s(self) -> float | None:
        """Return the seconds from the first begin of prefill to the end; None: one of them is not known yet."""
        done_s = next((mark.at_s for mark in self.marks if mark.name == "done" and mark.node == ROUTER), None)
        begun_s = min((mark.at_s for mark in self.marks if mark.name == "prefill"), default=None)
        return None if done_s is None or begun_s is None else max(0.0, done_s - begun_s)

    def as_dict(self, request_id: RequestId) -> dict[str, object]:
        """Return the response of ``/cluster/requests/{request_id}``: marks sorted by time, layers by number."""
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

    def summary(self, request_id: RequestId) -> dict[str, object]:
        """Return an item of ``/cluster/requests``; ``nodes`` are those that have reported their part."""
        its = [mark for mark in self.marks if mark.node == ROUTER]
        first_token_s = next((mark.at_s for mark in its if mark.name == "first_token"), None)
        return {
            "request_id": request_id,
            "received_s": its[0].at_s,
            "first_token_s": first_token_s,
            "done_s": its[-1].at_s if its[-1].name == "done" else None,
            "nodes": list(dict.fromkeys(mark.node for mark in self.marks if mark.node != ROUTER)),
        }


class Timelines:
    """Timelines of requests in progress and of recently ended ones, whose nodes may still report.

    ``inference`` counts how long requests took from the begin of prefill, for metrics.
    """

    def __init__(self) -> None:
        self._open: dict[RequestId, Timeline] = {}
        self._ended: OrderedDict[RequestId, Timeline] = OrderedDict()
        self.inference = Histogram(STAGE_BOUNDS_S)
        self.max_kept = MAX_KEPT

    def open(self, request_id: RequestId, first_epoch: int) -> None:
        """Begin the timeline of a new request, whose attempts have epochs from ``first_epoch`` on."""
        self._ended.pop(request_id, None)
        self._open[request_id] = Timeline(first_epoch)

    def mark(self, request_id: RequestId, name: str, now: float) -> None:
        """Add a mark of the router at time ``now``."""
        self._open[request_id].marks.append(Mark(name, now, ROUTER))

    def close(self, request_id: RequestId) -> None:
        """Mark the request as ended; drop the oldest ended timeline beyond ``max_kept``."""
        timeline = self._ended[request_id] = self._open.pop(request_id)
        if timeline.num_parts:
            self._count(timeline)
        if len(self._ended) > self.max_kept:
            self._ended.popitem(last=False)

    def merge(self, report: RequestTimeline) -> int:
        """Add a node's report if the request is known; return the KV bytes it reports.

        Not one of an earlier request with the same id, of which a node has only now freed the blocks.
        """
        timeline = self._find(report.request_id)
        if timeline is None or report.epoch < timeline.first_epoch or timeline.num_parts >= MAX_PARTS:
            return 0
        timeline.num_parts += 1
        timeline.marks += report.marks
        timeline.layers += report.layers
        self._count(timeline)
        return sum(layer.num_bytes for layer in report.layers)

    def _count(self, timeline: Timeline) -> None:
        """Count the request once its end and the begin of its prefill are known."""
        if not timeline.was_counted and (seconds := timeline.inference_s()) is not None:
            timeline.was_counted = True
            self.inference.observe(seconds)

    def newest(self, count: int) -> list[dict[str, object]]:
        """Return items of ``/cluster/requests``: requests in progress and then those that have ended, newest first."""
        requests: Iterator[tuple[RequestId, Timeline]] = chain(
            reversed(self._open.items()), reversed(self._ended.items())
        )
        return [timeline.summary(request_id) for request_id, timeline in islice(requests, count)]

    def get(self, request_id: RequestId) -> dict[str, object] | None:
        """Return one request's timeline, or None if it is not kept."""
        timeline = self._find(request_id)
        return timeline.as_dict(request_id) if timeline else None

    @property
    def num_open(self) -> int:
        """Number of requests in progress."""
        return len(self._open)

    def _find(self, request_id: RequestId) -> Timeline | None:
        return self._open.get(request_id) or self._ended.get(request_id)
