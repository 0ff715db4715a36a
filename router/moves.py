"""Moves preempted requests to nodes with room."""

from __future__ import annotations

from kvrelay.protocol.messages.router_to_node import Generate
from router.attempts import Attempts
from router.events import RouterOutbox
from router.placement import Placement
from router.request import RoutedRequest, Status
from router.request_table import RequestTable


class Moves:
    """Moves requests with their output tokens so far. The new node reloads the KV from the store if possible.

    The old node may be resuming the request at that moment; its later messages have a stale epoch and are dropped.
    """

    def __init__(self, table: RequestTable, attempts: Attempts, placement: Placement, outbox: RouterOutbox) -> None:
        self._table = table
        self._attempts = attempts
        self._placement = placement
        self._outbox = outbox

    def preempted(self, request: RoutedRequest, num_blocks: int) -> None:
        """Record that ``request`` waits for ``num_blocks`` blocks on its decode node; move it if another has room."""
        request.num_preempted_blocks = num_blocks
        self._table.mark(request, "preempted")
        self._table.preempted[request.request_id] = request
        self.move_all()

    def move_all(self) -> None:
        """Move the requests still preempted to nodes with room, longest waiting first."""
        for request in list(self._table.preempted.values()):
            num_blocks = request.num_preempted_blocks
            if num_blocks is None or request.decode is None or request.status is not Status.RUNNING:
                del self._table.preempted[request.request_id]
            else:
                self._move(request, num_blocks)

    def _move(self, request: RoutedRequest, num_blocks: int) -> None:
        epoch, nodes = request.epoch, request.nodes
        target = self._placement.move_decode(request, num_blocks)
        if target is None:
            return
        del self._table.preempted[request.request_id]
        for peer in nodes:
            self._attempts.abort(peer, request.request_id, epoch)
        spec = self._attempts.begin(request)
        request.attempts -= 1  # nothing failed
        self._table.counters.moved += 1
        self._table.mark(request, "moved")
        self._outbox.send(target.peer, Generate(request=spec))
