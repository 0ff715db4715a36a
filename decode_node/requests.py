"""All requests of a node, and how they end."""

from __future__ import annotations

from collections.abc import Iterator

from decode_node.request import DecodeRequest, DecodeStatus
from decode_node.schedule import Scheduler
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.ids import MESSAGER, Attempt
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.messages.node_to_messager import CancelKV
from kvrelay.protocol.messages.node_to_router import RequestFailed
from kvrelay.protocol.request import RequestSpec


class Requests:
    """Every request the node knows, over or not."""

    def __init__(self, node_id: str, scheduler: Scheduler, outbox: Outbox) -> None:
        self._node_id = node_id
        self._scheduler = scheduler
        self._outbox = outbox
        self._requests: dict[Attempt, DecodeRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DecodeRequest]:
        return iter(self._requests.values())

    def find(self, attempt: Attempt) -> DecodeRequest | None:
        """Return the request of ``attempt``."""
        return self._requests.get(attempt)

    def add(self, request: DecodeRequest) -> None:
        """Take ``request`` in."""
        self._requests[request.attempt] = request

    def open(self) -> list[DecodeRequest]:
        """Return those about which something is still to be said."""
        return [request for request in self if not request.is_over]

    def report(self, spec: RequestSpec, error: ErrorInfo) -> None:
        """Tell the router whose request it is that it has failed."""
        self._outbox.send(spec.router, RequestFailed(request_id=spec.request_id, epoch=spec.epoch, error=error))

    def fail(self, request: DecodeRequest, error: ErrorInfo) -> None:
        """End ``request`` with ``error``."""
        self.report(request.spec, error)
        self.close(request)

    def close(self, request: DecodeRequest) -> None:
        """End ``request`` as far as anyone outside is concerned; its blocks stay until nobody uses them."""
        scheduler = self._scheduler
        match request.status:
            case DecodeStatus.WAITING | DecodeStatus.PREEMPTED:
                scheduler.waiting.remove(request)
            case DecodeStatus.RESERVING | DecodeStatus.RECEIVING:
                del scheduler.receiving[request]
            case DecodeStatus.LOADING:
                scheduler.leave_loading(request)
            case DecodeStatus.RUNNING_PREFILL:
                scheduler.leave_prefill(request)
            case DecodeStatus.RUNNING_DECODE:
                del scheduler.decoding[request]
        request.lifecycle.move(DecodeStatus.CLOSING, self._outbox.now)
        if request.messager_holds:
            self._outbox.send(MESSAGER, CancelKV(request_id=request.spec.request_id, epoch=request.spec.epoch))
        self.end_if_unused(request)

    def end_if_unused(self, request: DecodeRequest) -> None:
        """Give the blocks of a closed request back once neither messager nor store nor a plan in flight uses them."""
        if request.messager_holds or request.is_loading or request.status is not DecodeStatus.CLOSING:
            return
        if request in self._scheduler.in_flight:
            return
        self._scheduler.plans.leave(request)
        self._scheduler.kv.unpin(request.block_table)
        request.lifecycle.move(DecodeStatus.ENDED, self._outbox.now)
        del self._requests[request.attempt]
        self._outbox.send(request.spec.router, request.timeline(self._node_id))

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless there are none, in the engine neither."""
        if self._requests or self._scheduler.in_flight or self._scheduler.plans:
            histories = {request.attempt: request.lifecycle.history for request in self}
            raise LocalProtocolError(f"{self._node_id} is not quiescent: {histories}")
