"""Search for another decode node when the first refused the reservation or was lost, while P computes the prompt."""

from __future__ import annotations

from kvrelay.protocol.messages.node_to_router import DecodeNeeded
from kvrelay.protocol.messages.router_to_node import AssignDecode
from router.events import RouterOutbox
from router.node_table import NodeTable
from router.placement import Placement
from router.request import RoutedRequest, Status
from router.request_table import RequestTable

MIN_SEEK_S = 0.05
"""Minimum delay in seconds before asking a decode node again that refused, even if its ``retry_after_s`` is shorter."""


class DecodeSearch:
    """Assigns decode nodes. A request without one is SEEKING_DECODE; searched again on registrations and by timer."""

    def __init__(self, table: RequestTable, node_table: NodeTable, placement: Placement, outbox: RouterOutbox) -> None:
        self._table = table
        self._node_table = node_table
        self._placement = placement
        self._outbox = outbox

    def needed(self, request: RoutedRequest, message: DecodeNeeded) -> None:
        """Handle P's request for another decode node. If none is found, set a timer to ask all nodes again later."""
        if request.decode is not None and request.decode != message.refused_by:
            self._send_assignment(request)  # P asks again: the assignment since then did not arrive
            return
        if request.decode is not None:
            request.refused_by.add(request.decode)
            self._placement.release_decode(request)
        self._table.counters.decode_refusals += 1
        if request.status is Status.RUNNING:
            request.lifecycle.move(Status.SEEKING_DECODE, self._outbox.now)
        if not self.seek(request):
            at_s = self._outbox.now + max(MIN_SEEK_S, message.retry_after_s)
            self._table.set_timer(request, "seek", at_s)

    def seek(self, request: RoutedRequest) -> bool:
        """Assign a decode node that has not refused and send it to P. Return False if there is none."""
        if self._placement.assign_decode(request) is None:
            return False
        self.found(request)
        self._send_assignment(request)
        return True

    def seek_again(self, request: RoutedRequest) -> None:
        """Search among all decode nodes, including those that refused."""
        request.refused_by.clear()
        self.seek(request)

    def found(self, request: RoutedRequest) -> None:
        """Record that ``request`` has a decode node."""
        if request.status is Status.SEEKING_DECODE:
            request.lifecycle.move(Status.RUNNING, self._outbox.now)

    def _send_assignment(self, request: RoutedRequest) -> None:
        decode = self._node_table.get(request.decode)
        if decode is not None and request.prefill is not None:
            assignment = AssignDecode(request_id=request.request_id, epoch=request.epoch, decode_node=decode.address)
            self._outbox.send(request.prefill, assignment)
