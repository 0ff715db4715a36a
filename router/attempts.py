"""Attempts: dispatch of requests to nodes, and retries after failures up to ``max_attempts``."""

from __future__ import annotations

import math

from kvrelay.config.cluster_config import Role
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.router_to_node import Abort, Generate, Prefill
from kvrelay.protocol.request import RequestSpec
from router.events import RouterOutbox
from router.limits import AttemptLimits
from router.placement import Placement
from router.request import RoutedRequest, Status
from router.request_table import RequestTable


class Attempts:
    """Starts, aborts and retries attempts. The first epoch is ``first_epoch`` + 1."""

    def __init__(
        self, limits: AttemptLimits, table: RequestTable, placement: Placement, outbox: RouterOutbox, first_epoch: int
    ) -> None:
        self._limits = limits
        self._table = table
        self._placement = placement
        self._outbox = outbox
        self._last_epoch = first_epoch

    @property
    def next_epoch(self) -> int:
        """The epoch of the next attempt, of whichever request."""
        return self._last_epoch + 1

    def dispatch(self, request: RoutedRequest) -> None:
        """Dispatch a waiting request to a node. If there is none, wait for one to register."""
        entry = self._placement.enter(request, self._outbox.now)
        if entry is None:
            self._wait_for_node(request)
            return
        spec = self.begin(request)
        request.lifecycle.move(Status.RUNNING, self._outbox.now)
        self._table.counters.attempts += 1
        self._table.mark(request, "dispatched")
        if entry.role is Role.DECODE:
            self._table.counters.local_prefills += 1
            self._table.mark(request, "local_prefill")
        if entry.role is not Role.PREFILL:
            self._outbox.send(entry.peer, Generate(request=spec))
            return
        decode = None if request.wants_one_token else self._placement.assign_decode(request)
        self._outbox.send(entry.peer, Prefill(request=spec, decode_node=decode.address if decode else None))

    def dispatch_soon(self, request: RoutedRequest) -> None:
        """Dispatch a waiting request in an event of its own: the loop runs other tasks between events."""
        self._table.set_timer(request, "retry", self._outbox.now)

    def begin(self, request: RoutedRequest) -> RequestSpec:
        """Begin an attempt under a new epoch; return the request spec for its node."""
        self._last_epoch += 1
        return request.next_attempt(self._last_epoch)

    def _wait_for_node(self, request: RoutedRequest) -> None:
        _, since_s = request.lifecycle.history[-1]
        if self._outbox.now - since_s >= self._limits.node_wait_s:
            self._table.fail(request, ErrorInfo.of(request.overdue(self._limits.node_wait_s)))
        else:
            self._table.set_timer(request, "retry", since_s + self._limits.node_wait_s)

    # ------------------------------------------------------------ failures

    def failed(self, request: RoutedRequest, error: ErrorInfo, by: PeerId, backoff_s: float | None = None) -> None:
        """Handle a failure reported by ``by``: abort the attempt on the other node and retry after ``backoff_s``.

        Ends the request if the error is not retryable or no attempt is left. The default backoff grows per attempt.
        """
        if backoff_s is None:
            backoff_s = self._backoff_s(request)
        self.abort_nodes(request, exclude=by)
        request.avoid.update(request.nodes)  # the node that did not report it may be the cause
        if not error.retryable or request.attempts >= self._limits.max_attempts:
            self._table.fail(request, error)
            return
        self._begin_again(request, backoff_s)

    def dropped(self, request: RoutedRequest, by: PeerId) -> None:
        """``by`` dropped the attempt without a failure: begin another at once, not counted in ``attempts``."""
        self.abort_nodes(request, exclude=by)
        request.attempts -= 1
        self._begin_again(request, 0.0)

    def _begin_again(self, request: RoutedRequest, backoff_s: float) -> None:
        self._placement.release(request)
        request.lifecycle.move(Status.WAITING, self._outbox.now)
        self._table.counters.retries += 1
        if backoff_s > 0:
            self._table.set_timer(request, "retry", self._outbox.now + backoff_s)
        else:
            self.dispatch(request)

    def _backoff_s(self, request: RoutedRequest) -> float:
        """Return the delay before the next attempt, in seconds.

        If every node has failed the request, one is probably dead but not yet declared lost. The delay is then the peer
        timeout, so that the next attempt starts after the loss is detected.
        """
        if request.attempts > 1 and not self._placement.has_untried(request):
            return self._limits.peer_timeout_s
        return self._limits.retry_backoff_s * math.pow(2, request.attempts - 1)

    # ------------------------------------------------------------ aborts

    def abort_nodes(self, request: RoutedRequest, *, exclude: PeerId | None = None) -> None:
        """Send Abort to all nodes of the current attempt except ``exclude``."""
        for peer in request.nodes:
            if peer != exclude:
                self.abort(peer, request.request_id, request.epoch)

    def abort(self, peer: PeerId, request_id: RequestId, epoch: int) -> None:
        """Send Abort for one attempt to ``peer``."""
        self._outbox.send(peer, Abort(request_id=request_id, epoch=epoch))
