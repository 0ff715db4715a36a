"""The router's requests in progress, from admission to the terminal delivery of each."""

from __future__ import annotations

from collections.abc import Iterator

from kvrelay.machine.contract import CancelTimer, SetTimer
from kvrelay.machine.laws import Laws, Violation
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.request import FinishReason
from router.counters import Counters
from router.events import Deliver, Delivery, RequestEnded, RequestErrored, RouterOutbox
from router.placement import Placement
from router.request import RequestTimer, RoutedRequest, Status, TimerKind
from router.timeline import Timelines


class RequestTable:
    """Requests by id, with their timelines and counters. Each is ended here, once.

    ``preempted``: the requests that wait for KV blocks after a preemption, longest waiting first.
    """

    def __init__(self, placement: Placement, outbox: RouterOutbox) -> None:
        self._placement = placement
        self._outbox = outbox
        self._requests: dict[RequestId, RoutedRequest] = {}
        self.preempted: dict[RequestId, RoutedRequest] = {}
        self.counters = Counters()
        self.timelines = Timelines()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RoutedRequest]:
        """Iterate over a snapshot: requests may end during the iteration."""
        return iter(list(self._requests.values()))

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._requests

    @property
    def by_status(self) -> dict[Status, int]:
        """Number of requests in each non-terminal status."""
        counts = dict.fromkeys((Status.WAITING, Status.RUNNING, Status.SEEKING_DECODE), 0)
        for request in self._requests.values():
            counts[request.status] += 1
        return counts

    def __getitem__(self, request_id: RequestId) -> RoutedRequest:
        return self._requests[request_id]

    def get(self, request_id: RequestId) -> RoutedRequest | None:
        """Return the request in progress, or None."""
        return self._requests.get(request_id)

    def named(self, name: str) -> list[RoutedRequest]:
        """Return the requests in progress that a client knows by ``name``.

        That is the id of one choice, or for all choices of an answer: the answer's id, or that id without ``cmpl-``,
        ``resp_`` or the like, which is the client's own if it gave one.
        """
        return [request for request in self._requests.values() if name in request.names]

    def current(self, request_id: RequestId, epoch: int) -> RoutedRequest | None:
        """Return the request if ``epoch`` is its current attempt; else count a stale message and return None."""
        request = self._requests.get(request_id)
        if request is not None and request.epoch == epoch and request.status is not Status.WAITING:
            return request
        self.counters.stale_messages += 1
        return None

    def mark(self, request: RoutedRequest, name: str) -> None:
        """Add a mark to the request's timeline."""
        self.timelines.mark(request.request_id, name, self._outbox.now)

    def set_timer(self, request: RoutedRequest, kind: TimerKind, at_s: float) -> None:
        """Set the timer of ``request`` of this kind, or move it. It is cancelled when the request ends."""
        timer = request.timers[kind] = RequestTimer(request.request_id, kind)
        self._outbox.do(SetTimer(timer, at_s))

    # ------------------------------------------------------------ begin and end

    def open(self, request: RoutedRequest, timeout_s: float, first_epoch: int) -> None:
        """Admit a request, which must end within ``timeout_s``. Its attempts have epochs from ``first_epoch`` on."""
        self._requests[request.request_id] = request
        self.counters.submitted += 1
        self.timelines.open(request.request_id, first_epoch)
        self.mark(request, "received")
        self.set_timer(request, "deadline", self._outbox.now + timeout_s)

    def finish(self, request: RoutedRequest, reason: FinishReason) -> None:
        """End ``request`` successfully."""
        self.counters.finished += 1
        self._end(request, Status.FINISHED, RequestEnded(reason))

    def fail(self, request: RoutedRequest, error: ErrorInfo) -> None:
        """End ``request`` with ``error``."""
        self.counters.failed += 1
        self._end(request, Status.FAILED, RequestErrored(error))

    def abort(self, request: RoutedRequest, delivery: Delivery) -> None:
        """End ``request``, whose client disconnected or which an operator cancelled, with ``delivery``."""
        self.counters.aborted += 1
        self._end(request, Status.ABORTED, delivery)

    def _end(self, request: RoutedRequest, status: Status, delivery: Delivery) -> None:
        request.lifecycle.move(status, self._outbox.now)
        self._placement.release(request)
        self.mark(request, "done")
        self.timelines.close(request.request_id)
        for timer in request.timers.values():
            self._outbox.do(CancelTimer(timer))
        del self._requests[request.request_id]
        self.preempted.pop(request.request_id, None)
        self._outbox.do(Deliver(request.request_id, delivery))

    def laws_at_rest(self) -> Laws:
        """Check that no request is held, by this table or by a node; see ``kvrelay.machine.laws``."""
        held = self._placement.held()
        if self._requests or self.preempted or held or self.timelines.num_open:
            text = f"requests {list(self._requests)}, held by nodes {held}, {self.timelines.num_open} timelines open"
            yield [Violation(text)]
