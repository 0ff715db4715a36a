"""Handles the events of clients, timers and nodes for the router's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from kvrelay.errors import (
    KVRelayError,
    LocalProtocolError,
    PeerLostError,
    RequestCancelledError,
    TransferError,
)
from kvrelay.machine.histogram import Histogram
from kvrelay.machine.laws import Laws
from kvrelay.protocol.ids import Attempt, PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.node_to_router import (
    DecodeNeeded,
    PromptLogprobsOut,
    RequestFailed,
    RequestOutput,
    RequestPreempted,
    RequestTimeline,
)
from kvrelay.protocol.request import FinishReason
from router.admission import Admission
from router.attempts import Attempts
from router.counters import Counters
from router.decode_search import DecodeSearch
from router.events import (
    Deliver,
    NewRequest,
    PromptLogprobsDelivered,
    RequestEnded,
    RequestErrored,
    RouterOutbox,
    TokensDelivered,
)
from router.limits import Limits
from router.moves import Moves
from router.node_table import Node, NodeTable
from router.placement import Placement
from router.request import RequestTimer, RoutedRequest, Status, share_routed_blocks
from router.request_table import RequestTable
from router.timeline import Timelines

MAX_DISPATCHED_AT_ONCE = 16
"""Requests of one submission that are dispatched in one event. Each of the others has an event of its own."""


class Requests:
    """All requests. Each admitted request gets exactly one terminal delivery."""

    def __init__(
        self, limits: Limits, node_table: NodeTable, placement: Placement, outbox: RouterOutbox, first_epoch: int = 0
    ) -> None:
        self._limits = limits
        self._node_table = node_table
        self._placement = placement
        self._outbox = outbox
        self._table = RequestTable(placement, outbox)
        self._admission = Admission(limits, node_table, placement, self._table)
        self._attempts = Attempts(limits.attempts, self._table, placement, outbox, first_epoch)
        self._search = DecodeSearch(self._table, node_table, placement, outbox)
        self._moves = Moves(self._table, self._attempts, placement, outbox)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def counters(self) -> Counters:
        """The router's counters."""
        return self._table.counters

    @property
    def timelines(self) -> Timelines:
        """The timelines of requests in progress and of recently ended ones."""
        return self._table.timelines

    @property
    def prediction_errors(self) -> dict[str, Histogram]:
        """How far first tokens came from when they were predicted, see ``Predictions.errors``."""
        return self._placement.predictions.errors

    @property
    def by_status(self) -> dict[Status, int]:
        """Number of requests in each non-terminal status."""
        return self._table.by_status

    def nodes_of(self, request_id: RequestId) -> list[PeerId]:
        """Return the nodes that may hold state of this request's current attempt."""
        request = self._table.get(request_id)
        return request.nodes if request is not None else []

    def named(self, name: str) -> list[RoutedRequest]:
        """Return the requests in progress that a client knows by ``name``, see ``RequestTable.named``."""
        return self._table.named(name)

    def laws_at_rest(self) -> Laws:
        """Check that no request is held; see ``kvrelay.machine.laws``."""
        return self._table.laws_at_rest()

    # ------------------------------------------------------------ admission

    def submit(self, requests: Sequence[NewRequest]) -> None:
        """Admit and dispatch ``requests``, or refuse them all. Raises LocalProtocolError if an id is in use."""
        for new in requests:
            if new.request_id in self._table:
                raise LocalProtocolError(f"request id {new.request_id} is in use")
        routed = [RoutedRequest(new, self._outbox.now) for new in requests]
        share_routed_blocks(routed)
        refusal = self._admission.refusal(routed, self._outbox.now)
        if refusal is not None:
            self.refuse(requests, refusal)
            return
        for request in routed:
            self._table.open(request, self._limits.request_timeout_s, self._attempts.next_epoch)
        for request in routed[:MAX_DISPATCHED_AT_ONCE]:
            self._attempts.dispatch(request)
        for request in routed[MAX_DISPATCHED_AT_ONCE:]:
            self._attempts.dispatch_soon(request)

    def refuse(self, requests: Sequence[NewRequest], error: KVRelayError) -> None:
        """Refuse ``requests`` with ``error``."""
        self.counters.refused += len(requests)
        for new in requests:
            self._outbox.do(Deliver(new.request_id, RequestErrored.of(error)))

    # ------------------------------------------------------------ messages of nodes

    def take_output(self, peer: PeerId, output: RequestOutput) -> None:
        """Deliver new tokens. A node that has no part in the current attempt gets an Abort."""
        request = self._table.current(output.request_id, output.epoch)
        if request is None:
            if output.finish_reason is None:
                self._attempts.abort(peer, output.request_id, output.epoch)
            return
        if peer not in request.participants:
            self.counters.stale_messages += 1
            self._attempts.abort(peer, output.request_id, output.epoch)
            return
        if peer not in (request.prefill, request.decode) and self._placement.adopt_decode(request, peer):
            self._search.found(request)
        request.num_preempted_blocks = None
        if output.index == 0 and not request.prompt.is_complete:
            lost = TransferError("logprobs of the prompt were lost", request_id=request.request_id)
            self._attempts.abort(peer, request.request_id, request.epoch)  # it does not know that it has failed
            self._attempts.failed(request, ErrorInfo.of(lost), peer)
            return
        for ready in request.output.take(output):
            self._deliver(request, ready)
            if ready.finish_reason is not None:
                return  # the request has ended, whatever its nodes say
        if peer == request.decode and request.prefill is not None and not request.output.has_gap:
            # All KV has arrived and been handed off, and so has the first token: nothing depends on P any more.
            self._placement.release_prefill(request)

    def _deliver(self, request: RoutedRequest, output: RequestOutput) -> None:
        if output.index == 0:
            self._table.mark(request, "first_token")
            self._placement.first_token_came(request, self._outbox.now)
            # Prefix hits of later attempts on KV computed by the first one are not counted.
            request.num_cached_tokens = min(output.num_cached_tokens, len(request.new.prompt_token_ids))
        self._placement.prompt_is_computed(request)
        if output.token_ids:
            tokens = TokensDelivered(
                output.token_ids,
                output.logprobs,
                request.num_cached_tokens,
                output.finish_reason,
                output.stop_token_id,
            )
            self._outbox.do(Deliver(request.request_id, tokens))
        if output.finish_reason is not None:
            self._table.finish(request, output.finish_reason)

    def take_prompt_logprobs(self, peer: PeerId, message: PromptLogprobsOut) -> None:
        """Deliver what is new. A node that has no part in the current attempt gets an Abort."""
        request = self._table.current(message.request_id, message.epoch)
        if request is None or peer not in request.participants:
            self._attempts.abort(peer, message.request_id, message.epoch)
        elif (logprobs := request.prompt.take(message.logprobs)) is not None:
            self._outbox.do(Deliver(request.request_id, PromptLogprobsDelivered(logprobs)))

    def take_failure(self, peer: PeerId, failure: RequestFailed) -> None:
        """Retry on other nodes, or end the request with the node's error."""
        request = self._table.current(failure.request_id, failure.epoch)
        if request is None or peer not in request.nodes:
            return
        node = self._node_table.get(peer)
        if node is not None and node.leaving and failure.error.retryable:
            self._attempts.dropped(request, peer)  # it hands back what it cannot finish in time
        else:
            self._attempts.failed(request, failure.error, peer)

    def take_held(self, peer: PeerId, attempts: Sequence[Attempt]) -> None:
        """Abort those of ``attempts`` that are over, or in which ``peer`` has no part."""
        for request_id, epoch in attempts:
            request = self._table.current(request_id, epoch)
            if request is None or peer not in request.participants:
                self._attempts.abort(peer, request_id, epoch)

    def take_decode_needed(self, peer: PeerId, needed: DecodeNeeded) -> None:
        """Find another decode node, unless the request is already decoding."""
        request = self._table.current(needed.request_id, needed.epoch)
        if request is None:
            self._attempts.abort(peer, needed.request_id, needed.epoch)
        elif request.prefill == peer:
            self._search.needed(request, needed)

    def take_preempted(self, peer: PeerId, preempted: RequestPreempted) -> None:
        """Move the request to a node that has room for it, now or later."""
        request = self._table.current(preempted.request_id, preempted.epoch)
        if request is None:
            self._attempts.abort(peer, preempted.request_id, preempted.epoch)
        elif request.decode == peer:
            self._moves.preempted(request, preempted.num_blocks)

    def take_timeline(self, report: RequestTimeline) -> None:
        """Add a node's part to a timeline."""
        self.counters.kv_bytes_moved += self.timelines.merge(report)

    # ------------------------------------------------------------ node changes

    def node_joined(self) -> None:
        """Dispatch the requests that wait for a node, after one has registered."""
        share_routed_blocks([request for request in self._table if request.status is Status.WAITING])
        for request in self._table:
            if request.status is Status.WAITING:
                self._attempts.dispatch(request)
            elif request.status is Status.SEEKING_DECODE:
                self._search.seek(request)

    def node_reported(self) -> None:
        """Move preempted requests if the newly reported load leaves room."""
        self._moves.move_all()

    def node_lost(self, node: Node, reason: str) -> None:
        """Fail the current attempts of all requests on a lost node."""
        for request in self._requests_of(node):
            message = f"node {node.node_id} disconnected: {reason}"
            error = ErrorInfo.of(PeerLostError(message, request_id=request.request_id))
            self._attempts.failed(request, error, node.peer, backoff_s=0.0)

    def node_dropped_requests(self, node: Node) -> None:
        """Restart all requests of a node that dropped them because this router was paused. Not counted as failures."""
        for request in self._requests_of(node):
            self._attempts.dropped(request, node.peer)

    def _requests_of(self, node: Node) -> list[RoutedRequest]:
        """Return the requests on ``node``, without those that have left it since it was removed from the table."""
        pending = [self._table.get(request_id) for request_id in node.pending]
        return [request for request in pending if request is not None and node.peer in request.nodes]

    # ------------------------------------------------------------ clients and timers

    def abort(self, request_id: RequestId) -> None:
        """End a request whose client disconnected."""
        request = self._table.get(request_id)
        if request is not None:
            self._attempts.abort_nodes(request)
            self._table.abort(request, RequestEnded(FinishReason.ABORT))

    def cancel(self, request_id: RequestId) -> None:
        """End a request that an operator has cancelled."""
        request = self._table.get(request_id)
        if request is not None:
            self._attempts.abort_nodes(request)
            error = RequestCancelledError("an operator has cancelled the request", request_id=request_id)
            self._table.abort(request, RequestErrored.of(error))

    def stop_matched(self, request_id: RequestId) -> None:
        """End a request whose text contains a stop string."""
        request = self._table.get(request_id)
        if request is not None:
            self._attempts.abort_nodes(request)
            self._table.finish(request, FinishReason.STOP)

    def take_timer(self, timer: RequestTimer) -> None:
        """Handle a timer, unless the request has ended or its status has changed."""
        request = self._table.get(timer.request_id)
        if request is None:
            return
        match timer.kind:
            case "deadline":
                self._fail(request, request.overdue(self._limits.request_timeout_s))
            case "retry":
                if request.status is Status.WAITING:
                    self._attempts.dispatch(request)
            case "seek":
                if request.status is Status.SEEKING_DECODE:
                    self._search.seek_again(request)
            case _:
                assert_never(timer.kind)

    def fail_all(self, error: KVRelayError) -> None:
        """End every request with ``error``."""
        for request in self._table:
            self._fail(request, error)

    def _fail(self, request: RoutedRequest, error: KVRelayError) -> None:
        self._attempts.abort_nodes(request)
        self._table.fail(request, ErrorInfo.of(error))
