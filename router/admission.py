"""Whether the router takes requests. What it refuses here no node has heard of."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.errors import KVRelayError, NoNodeError, QueueFullError, TTFTLimitError
from kvrelay.protocol.quantities import MAX_DURATION_S
from router.limits import Limits
from router.node_table import NodeTable
from router.placement import Placement
from router.request import RoutedRequest
from router.request_table import RequestTable

TTFT_LIMIT_HEADER = "x-llm-d-slo-ttft-ms"
"""The header in which a client gives the longest time to first token that it accepts, in milliseconds."""

MAX_PREDICTED_AT_ONCE = 8
"""Requests of one client's request whose times to first token are predicted, so that they do not hold the loop."""


class Admission:
    """Refuses requests if too many are in progress, no node can serve them, or first tokens would come too late."""

    def __init__(self, limits: Limits, node_table: NodeTable, placement: Placement, table: RequestTable) -> None:
        self._limits = limits
        self._node_table = node_table
        self._placement = placement
        self._table = table

    def refusal(self, requests: Sequence[RoutedRequest], now: float) -> KVRelayError | None:
        """Return why ``requests``, which belong together, are all refused, or None."""
        most, num_open = self._limits.max_queued_requests, len(self._table)
        if num_open + len(requests) > most:
            return QueueFullError(f"{num_open} requests are in progress and {len(requests)} came; the limit is {most}")
        reason = self._node_table.unready_reason()
        if reason is not None and not self._node_table.may_come(now, self._limits.node_wait_s):
            return NoNodeError(reason)
        too_late = (self._too_late(request, now) for request in requests[:MAX_PREDICTED_AT_ONCE])
        return next((error for error in too_late if error is not None), None)

    def _too_late(self, request: RoutedRequest, now: float) -> TTFTLimitError | None:
        """Return the refusal if the first token of ``request`` is predicted to come later than it may.

        Each request is looked at as if it came alone. A node that has not measured its speed is no reason to refuse: it
        would never be measured if all were. For the same reason prompts of any length are admitted now and then.
        """
        own_s = request.new.max_ttft_s
        limit_s = self._limits.ttft_slo_s if own_s is None else own_s
        prediction = self._placement.predict(request, now) if limit_s is not None else None
        if limit_s is None or prediction is None or not prediction.is_measured or prediction.ttft_s <= limit_s:
            return None
        if not self._placement.predictions.may_refuse(prediction, now):
            return None
        self._table.counters.refused_for_ttft += 1
        return TTFTLimitError(
            f"the first token is predicted after {prediction.ttft_s:.3g} s: {prediction.queue_s:.3g} s for other "
            f"prompts and {prediction.prefill_s:.3g} s for this one; the limit is {limit_s:.3g} s "
            f"({'router.ttft_slo_s' if own_s is None else TTFT_LIMIT_HEADER})",
            retry_after_s=min(prediction.ttft_s - limit_s, MAX_DURATION_S),  # inf: of a node that is all but still
            param=None if own_s is None else TTFT_LIMIT_HEADER,
        )
