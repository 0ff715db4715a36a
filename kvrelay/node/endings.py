"""How requests end on a node, and when their blocks are given back."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

from kvrelay.machine.laws import Laws, Violation
from kvrelay.machine.outbox import Outbox
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.plans import PlanWriter
from kvrelay.node.request import Holder, NodeRequest
from kvrelay.node.request_table import RequestTable
from kvrelay.node.stage_times import StageTimes
from kvrelay.protocol.ids import MESSAGER
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.node_to_messager import CancelKV, CloseTransfer
from kvrelay.protocol.messages.node_to_router import RequestFailed
from kvrelay.protocol.request import RequestSpec
from kvstore.blocks.kv_cache import KVCache

R = TypeVar("R", bound=NodeRequest[Any])
S = TypeVar("S", bound=StrEnum)


class LastStatuses(NamedTuple, Generic[S]):
    """``closing``: over, but its blocks are still used. ``ended``: they are given back."""

    closing: S
    ended: S


class Endings(Generic[R, S]):
    """Ends requests. Their blocks are given back when they have no holder and are in no plan in flight.

    ``stop_messager`` is the message that makes the messager stop using a request's blocks. The caller reports its
    answer, and the end of everything else that held blocks, with ``release``. After each plan it calls
    ``end_if_unused`` for the requests of the plan that are over. ``stages`` are for metrics.
    """

    def __init__(
        self,
        node_id: str,
        requests: RequestTable[R, S],
        last: LastStatuses[S],
        stop_messager: type[CancelKV] | type[CloseTransfer],
        kv: KVCache,
        plans: PlanWriter,
        in_flight: PlansInFlight[R],
        outbox: Outbox,
    ) -> None:
        self._node_id = node_id
        self._requests = requests
        self._last = last
        self._stop_messager = stop_messager
        self._kv = kv
        self._plans = plans
        self._in_flight = in_flight
        self._outbox = outbox
        self.stages = StageTimes()

    def report(self, spec: RequestSpec, error: ErrorInfo) -> None:
        """Tell the router whose request it is that it has failed."""
        self._outbox.send(spec.router, RequestFailed(request_id=spec.request_id, epoch=spec.epoch, error=error))

    def fail(self, request: R, error: ErrorInfo) -> None:
        """End ``request`` with ``error``."""
        self.report(request.spec, error)
        self.close(request, error.message)

    def close(self, request: R, reason: str) -> None:
        """End ``request`` for everyone outside; its blocks stay until nothing uses them.

        ``reason`` is for a peer that still works for it.
        """
        if Holder.MESSAGER in request.holders:
            self._stop_using_blocks_of(request)
        self._requests.move(request, self._last.closing, self._outbox.now)
        self.release(request, Holder.REQUEST)

    def _stop_using_blocks_of(self, request: R) -> None:
        stop = self._stop_messager(request_id=request.spec.request_id, epoch=request.spec.epoch)
        self._outbox.send(MESSAGER, stop)

    def remind_messager(self, after_s: float) -> None:
        """Tell the messager again of requests that have been over for ``after_s`` and whose blocks it still holds.

        Either message may have been lost. The messager answers as often as it is told.
        """
        for request in self._requests:
            if request.is_over and Holder.MESSAGER in request.holders:
                _, since_s = request.lifecycle.history[-1]
                if self._outbox.now - since_s >= after_s:
                    self._stop_using_blocks_of(request)

    def release(self, request: R, holder: Holder) -> None:
        """Note that ``holder`` uses the blocks no longer; without effect if it did not."""
        request.holders.discard(holder)
        self.end_if_unused(request)

    def end_if_unused(self, request: R) -> None:
        """Give the blocks of ``request`` back and forget it, if nothing uses them."""
        if request.holders or request.status is self._last.ended or request in self._in_flight:
            return
        self._plans.leave(request)
        self._kv.unpin(request.block_table)
        self._requests.move(request, self._last.ended, self._outbox.now)
        self.stages.ended(request)
        self._outbox.send(request.spec.router, request.timeline(self._node_id))

    def laws_at_rest(self) -> Laws:
        """Check that no request is left, nor a sequence in the engine; see ``kvrelay.machine.laws``."""
        if self._requests or self._in_flight or self._plans:
            histories = {request.attempt: request.lifecycle.history for request in self._requests}
            text = f"{len(self._plans)} sequences in the engine, {len(self._in_flight)} plans in flight, {histories}"
            yield [Violation(f"requests are not over: {text}")]
        yield from self._requests.laws_at_rest()
