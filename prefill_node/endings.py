"""How requests end on a prefill node."""

from __future__ import annotations

from kvrelay.machine.contract import CancelTimer
from kvrelay.machine.outbox import Outbox
from kvrelay.machine.recent import Recent
from kvrelay.node.endings import Endings, LastStatuses
from kvrelay.node.in_flight import PlansInFlight
from kvrelay.node.plans import PlanWriter
from kvrelay.protocol.ids import Attempt
from kvrelay.protocol.messages.node_to_messager import CloseTransfer
from kvrelay.protocol.messages.prefill_to_decode import CancelReservation
from kvstore.blocks.kv_cache import KVCache
from prefill_node.request import PrefillRequest, PrefillStatus, Reservation
from prefill_node.requests import Requests

_LAST = LastStatuses(PrefillStatus.CLOSING, PrefillStatus.ENDED)


class PrefillEndings(Endings[PrefillRequest, PrefillStatus]):
    """Ends requests together with their reservations, and remembers for a while which have ended."""

    def __init__(
        self,
        node_id: str,
        requests: Requests,
        kv: KVCache,
        plans: PlanWriter,
        in_flight: PlansInFlight[PrefillRequest],
        outbox: Outbox,
    ) -> None:
        super().__init__(node_id, requests, _LAST, CloseTransfer, kv, plans, in_flight, outbox)
        self._ended: Recent[bool] = Recent()

    def has_ended(self, attempt: Attempt) -> bool:
        """Return whether a request of ``attempt`` has ended lately."""
        return self._ended.get(attempt) is True

    def close(self, request: PrefillRequest, reason: str) -> None:
        """Give the reservation on D up, and end ``request`` as every node does."""
        self.cancel_reservation(request, reason)
        super().close(request, reason)

    def end_if_unused(self, request: PrefillRequest) -> None:
        """Do so as every node does, and remember a request that has ended."""
        super().end_if_unused(request)
        if request.status is PrefillStatus.ENDED:
            self._ended.note(request.attempt, True)

    def cancel_reservation(self, request: PrefillRequest, reason: str) -> None:
        """Give up what ``request`` has reserved on its decode node or asked for, and the deadline of its answer."""
        if request.reservation is not Reservation.NONE:
            self._outbox.do(CancelTimer(request.attempt))
        if request.reservation in (Reservation.ASKED, Reservation.GRANTED):
            spec = request.spec
            cancel = CancelReservation(request_id=spec.request_id, epoch=spec.epoch, reason=reason)
            self._outbox.send(request.target.peer, cancel)
        request.reservation = Reservation.NONE
