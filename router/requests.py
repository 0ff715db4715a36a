"""All requests of the router, and what becomes of each as nodes take, refuse, serve, fail and leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from kvrelay.config.cluster_config import Role
from kvrelay.errors import (
    KVRelayError,
    LocalProtocolError,
    NoNodeError,
    PeerLostError,
    QueueFullError,
)
from kvrelay.machine.contract import CancelTimer, CoreAction, Send, SetTimer
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.node_to_router import DecodeNeeded, RequestFailed, RequestOutput, RequestPreempted
from kvrelay.protocol.messages.router_to_node import Abort, AssignDecode, Generate, Prefill
from kvrelay.protocol.request import FinishReason
from router.counters import Counters
from router.events import Deliver, NewRequest, RequestEnded, RequestErrored, TokensDelivered
from router.limits import Limits
from router.node_table import Node, NodeTable
from router.placement import Placement
from router.request import RoutedRequest, Status
from router.timeline import Timelines

MIN_SEEK_S = 0.05
"""A decode node that refused is not asked again sooner, whatever it says."""


class RequestTimer(NamedTuple):
    """Key of a request's timers: its last moment, its next try, its next search for a decode node."""

    request_id: str
    kind: Literal["deadline", "retry", "seek"]


class Requests:
    """Owner of every request. ``perform`` takes the actions in order; ``now`` is the time of the present event."""

    def __init__(
        self,
        limits: Limits,
        node_table: NodeTable,
        placement: Placement,
        perform: Callable[[CoreAction | Deliver], None],
        first_epoch: int = 0,
    ) -> None:
        self._limits = limits
        self._node_table = node_table
        self._placement = placement
        self._perform = perform
        self._requests: dict[str, RoutedRequest] = {}
        self._preempted: dict[str, RoutedRequest] = {}
        self._last_epoch = first_epoch
        self.now = 0.0
        self.counters = Counters()
        self.timelines = Timelines()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def by_status(self) -> dict[Status, int]:
        """How many requests are in each status that is not an end."""
        counts = dict.fromkeys((Status.WAITING, Status.RUNNING, Status.SEEKING_DECODE), 0)
        for request in self._requests.values():
            counts[request.status] += 1
        return counts

    # ------------------------------------------------------------ admission

    def submit(self, requests: Sequence[NewRequest]) -> None:
        """Admit ``requests`` and send them off, or refuse them all. Raises LocalProtocolError if an id is in use."""
        for new in requests:
            if new.request_id in self._requests:
                raise LocalProtocolError(f"request id {new.request_id} is in use")
        refusal = self._refusal(requests)
        if refusal is not None:
            self.refuse(requests, refusal)
            return
        for new in requests:
            request = self._requests[new.request_id] = RoutedRequest(new, self.now)
            self.counters.submitted += 1
            self.timelines.open(new.request_id)
            self.timelines.mark(new.request_id, "received", self.now)
            self._perform(SetTimer(RequestTimer(new.request_id, "deadline"), self.now + self._limits.request_timeout_s))
            self._dispatch(request)

    def refuse(self, requests: Sequence[NewRequest], error: KVRelayError) -> None:
        """End ``requests``, which are not admitted, with ``error``."""
        self.counters.refused += len(requests)
        for new in requests:
            self._perform(Deliver(new.request_id, RequestErrored.of(error)))

    def _refusal(self, requests: Sequence[NewRequest]) -> KVRelayError | None:
        most = self._limits.max_queued_requests
        if len(self) + len(requests) > most:
            return QueueFullError(f"{len(self)} requests are in progress and {len(requests)} came; the limit is {most}")
        reason = self._node_table.unready_reason()
        if reason is None or self._node_table.may_come_back(self.now, self._limits.node_wait_s):
            return None
        return NoNodeError(reason)

    # ------------------------------------------------------------ dispatch

    def _dispatch(self, request: RoutedRequest) -> None:
        """Give a waiting request to a node; without one it waits for a node to register."""
        entry = self._placement.enter(request)
        if entry is None:
            self._wait_for_node(request)
            return
        self._last_epoch += 1
        spec = request.next_attempt(self._last_epoch)
        request.lifecycle.move(Status.RUNNING, self.now)
        self.counters.attempts += 1
        self.timelines.mark(request.request_id, "dispatched", self.now)
        if entry.role is Role.DECODE:
            self.counters.local_prefills += 1
            self.timelines.mark(request.request_id, "local_prefill", self.now)
        if entry.role is not Role.PREFILL:
            self._perform(Send(entry.peer, Generate(request=spec)))
            return
        decode = None if request.wants_one_token else self._placement.assign_decode(request)
        self._perform(Send(entry.peer, Prefill(request=spec, decode_node=decode.address if decode else None)))

    def _wait_for_node(self, request: RoutedRequest) -> None:
        _, since_s = request.lifecycle.history[-1]
        if self.now - since_s >= self._limits.node_wait_s:
            self._fail(request, ErrorInfo.of(request.overdue(self._limits.node_wait_s)))
        else:
            self._set_timer(request, "retry", since_s + self._limits.node_wait_s)

    def node_joined(self) -> None:
        """A node registered: those who waited for one may go on."""
        for request in list(self._requests.values()):
            if request.status is Status.WAITING:
                self._dispatch(request)
            elif request.status is Status.SEEKING_DECODE:
                self._seek_decode(request)

    # ------------------------------------------------------------ what nodes say

    def take_output(self, peer: PeerId, output: RequestOutput) -> None:
        """Deliver new tokens. A node that sends tokens of an attempt that is over is told so."""
        request = self._current(output.request_id, output.epoch)
        if request is None:
            if output.finish_reason is None:
                self._abort(peer, output.request_id, output.epoch)
            return
        if peer not in request.nodes and self._placement.adopt_decode(request, peer):
            self._found_decode(request)
        if peer == request.decode and request.prefill is not None:
            # All KV has arrived and been handed off: nothing depends on P any more.
            self._placement.release_prefill(request)
        request.num_preempted_blocks = None
        for ready in request.output.take(output):
            self._deliver(request, ready)

    def take_failure(self, peer: PeerId, failure: RequestFailed) -> None:
        """Try again elsewhere, or end the request with the node's error."""
        request = self._current(failure.request_id, failure.epoch)
        if request is not None and peer in request.nodes:
            self._attempt_over(request, failure.error, peer, self._backoff_s(request))

    def take_decode_needed(self, peer: PeerId, needed: DecodeNeeded) -> None:
        """Find another decode node, or ask the same one again when it said it might have room."""
        request = self._current(needed.request_id, needed.epoch)
        if request is None:
            self._abort(peer, needed.request_id, needed.epoch)
            return
        if request.prefill != peer:
            return  # said long ago: the request is decoding
        if request.decode is not None and request.decode != needed.refused_by:
            self._send_assignment(request)  # said again: the assignment since then did not get through
            return
        if request.decode is not None:
            request.refused_by.add(request.decode)
            self._placement.release_decode(request)
        self.counters.decode_refusals += 1
        if request.status is Status.RUNNING:
            request.lifecycle.move(Status.SEEKING_DECODE, self.now)
        if not self._seek_decode(request):
            self._set_timer(request, "seek", self.now + max(MIN_SEEK_S, needed.retry_after_s))

    def take_preempted(self, peer: PeerId, preempted: RequestPreempted) -> None:
        """A decode node had to put a request off: another may have room for it sooner."""
        request = self._current(preempted.request_id, preempted.epoch)
        if request is None:
            self._abort(peer, preempted.request_id, preempted.epoch)
        elif request.decode == peer:
            request.num_preempted_blocks = preempted.num_blocks
            self.timelines.mark(request.request_id, "preempted", self.now)
            self._preempted[request.request_id] = request
            self.move_preempted()

    def move_preempted(self) -> None:
        """Give requests that wait for blocks on one node to others that have room, longest waiting first.

        What was generated so far goes along, and the other node finds the KV in the store if they share one. The first
        node may be resuming the request just now: what it still sends is of an epoch that is over.
        """
        for request in list(self._preempted.values()):
            num_blocks, source = request.num_preempted_blocks, request.decode
            if num_blocks is None or source is None or request.status is not Status.RUNNING:
                del self._preempted[request.request_id]
                continue
            epoch, nodes = request.epoch, request.nodes
            target = self._placement.move_decode(request, num_blocks)
            if target is None:
                continue
            del self._preempted[request.request_id]
            for peer in nodes:
                self._abort(peer, request.request_id, epoch)
            self._last_epoch += 1
            spec = request.next_attempt(self._last_epoch)
            request.attempts -= 1  # nothing failed
            self.counters.moved += 1
            self.timelines.mark(request.request_id, "moved", self.now)
            self._perform(Send(target.peer, Generate(request=spec)))

    def node_lost(self, node: Node, reason: str) -> None:
        """Take every request away from a node that disconnected."""
        for request_id in list(node.pending):
            error = ErrorInfo.of(PeerLostError(f"node {node.node_id} disconnected: {reason}", request_id=request_id))
            self._attempt_over(self._requests[request_id], error, node.peer, 0.0)

    def node_forgot(self, node: Node) -> None:
        """Begin every request of a node again: it dropped them because this router was held up. Nothing failed."""
        for request_id in list(node.pending):
            request = self._requests[request_id]
            self._abort_nodes(request, exclude=node.peer)
            request.attempts -= 1
            self._begin_again(request, 0.0)

    # ------------------------------------------------------------ what clients and timers say

    def abort(self, request_id: str) -> None:
        """End a request whose client disconnected."""
        request = self._requests.get(request_id)
        if request is not None:
            self._abort_nodes(request)
            self._end(request, Status.ABORTED)
            self.counters.aborted += 1
            self._perform(Deliver(request_id, RequestEnded(FinishReason.ABORT)))

    def stop_matched(self, request_id: str) -> None:
        """A stop string ended the text."""
        request = self._requests.get(request_id)
        if request is not None:
            self._abort_nodes(request)
            self._finish(request, RequestEnded(FinishReason.STOP))

    def take_timer(self, timer: RequestTimer) -> None:
        """Do what was put off, unless it has been done meanwhile."""
        request = self._requests.get(timer.request_id)
        if request is None:
            return
        if timer.kind == "deadline":
            self._abort_nodes(request)
            self._fail(request, ErrorInfo.of(request.overdue(self._limits.request_timeout_s)))
        elif timer.kind == "retry" and request.status is Status.WAITING:
            self._dispatch(request)
        elif timer.kind == "seek" and request.status is Status.SEEKING_DECODE:
            request.refused_by.clear()
            self._seek_decode(request)

    def fail_all(self, error: KVRelayError) -> None:
        """End everything with ``error``: the router is leaving."""
        for request in list(self._requests.values()):
            self._abort_nodes(request)
            self._fail(request, ErrorInfo.of(error))

    # ------------------------------------------------------------ steps

    def _seek_decode(self, request: RoutedRequest) -> bool:
        """Have P ask a decode node that has not refused. If there is none, return False."""
        if self._placement.assign_decode(request) is None:
            return False
        self._found_decode(request)
        self._send_assignment(request)
        return True

    def _found_decode(self, request: RoutedRequest) -> None:
        if request.status is Status.SEEKING_DECODE:
            request.lifecycle.move(Status.RUNNING, self.now)

    def _send_assignment(self, request: RoutedRequest) -> None:
        decode = self._node_table.get(request.decode)
        if decode is not None and request.prefill is not None:
            assignment = AssignDecode(request_id=request.request_id, epoch=request.epoch, decode_node=decode.address)
            self._perform(Send(request.prefill, assignment))

    def _deliver(self, request: RoutedRequest, output: RequestOutput) -> None:
        if output.index == 0:
            self.timelines.mark(request.request_id, "first_token", self.now)
            # Later attempts hit what the first one computed, which does not count.
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
            self._perform(Deliver(request.request_id, tokens))
        if output.finish_reason is not None:
            self._finish(request, RequestEnded(output.finish_reason))

    def _attempt_over(self, request: RoutedRequest, error: ErrorInfo, by: PeerId, backoff_s: float) -> None:
        """The present attempt failed at ``by``: take it from the partner and begin another, if one is left."""
        self._abort_nodes(request, exclude=by)
        request.avoid.update(request.nodes)  # whoever says it, the fault may be the partner's
        if not error.retryable or request.attempts >= self._limits.max_attempts:
            self._fail(request, error)
            return
        self._begin_again(request, backoff_s)

    def _begin_again(self, request: RoutedRequest, backoff_s: float) -> None:
        """Begin another attempt after ``backoff_s``."""
        self._placement.release(request)
        request.lifecycle.move(Status.WAITING, self.now)
        self.counters.retries += 1
        if backoff_s > 0:
            self._set_timer(request, "retry", self.now + backoff_s)
        else:
            self._dispatch(request)

    def _backoff_s(self, request: RoutedRequest) -> float:
        """Return how long to wait before the next attempt.

        When every node has failed it, one of them is probably dead and not yet known to be: the last attempts are for
        when it is.
        """
        if request.attempts > 1 and not self._placement.has_untried(request):
            return self._limits.peer_timeout_s
        return self._limits.retry_backoff_s * math.pow(2, request.attempts - 1)

    def _finish(self, request: RoutedRequest, ended: RequestEnded) -> None:
        self._end(request, Status.FINISHED)
        self.counters.finished += 1
        self._perform(Deliver(request.request_id, ended))

    def _fail(self, request: RoutedRequest, error: ErrorInfo) -> None:
        self._end(request, Status.FAILED)
        self.counters.failed += 1
        self._perform(Deliver(request.request_id, RequestErrored(error)))

    def _end(self, request: RoutedRequest, status: Status) -> None:
        request.lifecycle.move(status, self.now)
        self._placement.release(request)
        self.timelines.mark(request.request_id, "done", self.now)
        self.timelines.close(request.request_id)
        for kind in ("deadline", "retry", "seek"):
            self._perform(CancelTimer(RequestTimer(request.request_id, kind)))
        del self._requests[request.request_id]
        self._preempted.pop(request.request_id, None)

    # ------------------------------------------------------------ helpers

    def _current(self, request_id: str, epoch: int) -> RoutedRequest | None:
        """Return the request if it is alive and ``epoch`` its present attempt."""
        request = self._requests.get(request_id)
        if request is not None and request.epoch == epoch and request.status is not Status.WAITING:
            return request
        self.counters.stale_messages += 1
        return None

    def _abort_nodes(self, request: RoutedRequest, *, exclude: PeerId | None = None) -> None:
        for peer in request.nodes:
            if peer != exclude:
                self._abort(peer, request.request_id, request.epoch)

    def _abort(self, peer: PeerId, request_id: str, epoch: int) -> None:
        self._perform(Send(peer, Abort(request_id=request_id, epoch=epoch)))

    def _set_timer(self, request: RoutedRequest, kind: Literal["retry", "seek"], at_s: float) -> None:
        self._perform(SetTimer(RequestTimer(request.request_id, kind), at_s))

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError if anything is left of any request."""
        held = self._placement.held()
        if self._requests or held or self.timelines.num_open:
            raise LocalProtocolError(f"not quiescent: requests {list(self._requests)}, held by nodes {held}")
