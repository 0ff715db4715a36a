"""The router's end of one worker: passes its events to the machine, and deliveries to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from itertools import count
from typing import Any, assert_never

from starlette.types import ASGIApp

from kvrelay.errors import KVRelayError
from kvrelay.protocol.ids import RequestId
from router.client_metrics import ClientMetrics
from router.events import PARTS, ClientGone, Deliver, Delivery, NewRequest, RequestErrored, StopMatched
from router.http.api_keys import ApiKey
from router.http.asgi import send_internal_error
from router.http.key_limits import KeyUses, Use
from router.service import RouterService
from router.workers.messages import (
    Answered,
    Asked,
    FromWorker,
    InProgress,
    InProgressAsked,
    Ready,
    Reported,
    ReportWanted,
    Submission,
    ToWorker,
    UseBegun,
    UseCharged,
    UseEnded,
    UseWanted,
)


class WorkerLink:
    """What one worker has in the router: its requests, its uses of API keys, its open questions.

    ``state``: the application that answers what only the machine knows. A worker ends only its own requests.
    """

    def __init__(
        self,
        service: RouterService,
        uses: KeyUses,
        metrics: ClientMetrics,
        state: ASGIApp,
        send: Callable[[ToWorker], None],
    ) -> None:
        self._service = service
        self._uses = uses
        self._metrics = metrics
        self._state = state
        self._send = send
        self._is_closed = False
        self._requests: set[RequestId] = set()
        self._submitted: list[NewRequest] = []
        self._begun: dict[int, Use] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._reports: dict[int, asyncio.Future[None]] = {}
        self._ask_ids = count(1)
        self._num_unanswered = 0
        self.ready = asyncio.Event()
        """Set when the worker can serve."""

    @property
    def num_requests(self) -> int:
        """Requests of its clients that have not ended."""
        return len(self._requests)

    def receive(self, message: FromWorker) -> None:
        """Handle a message of the worker."""
        self._num_unanswered = 0
        match message:
            case Submission(requests=requests, more=more):
                self._submitted += requests
                if not more:
                    self._submit()
            case ClientGone(request_id=request_id):
                if request_id in self._requests:
                    self._service.client_disconnected(request_id)
            case StopMatched(request_id=request_id):
                if request_id in self._requests:
                    self._service.stop_matched(request_id)
            case Asked():
                task = asyncio.get_running_loop().create_task(self._answer(message))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case InProgressAsked(ask_id=ask_id, request_ids=request_ids):
                self._send(InProgress(ask_id, self._service.has_any(request_ids)))
            case UseWanted() | UseCharged() | UseEnded():
                self._take_use(message)
            case Reported(ask_id=ask_id, report=report):
                self._metrics.add(report)
                self._told(ask_id)
            case Ready():
                self.ready.set()
            case _:
                assert_never(message)

    def close(self) -> int:
        """Abort its requests and end its uses, because the worker has ended; return how many requests there were."""
        self._is_closed = True
        for request_id in self._requests:
            self._service.client_disconnected(request_id)
        for use in self._begun.values():
            use.end()
        self._begun.clear()
        for task in self._answering:
            task.cancel()
        for ask_id in list(self._reports):
            self._told(ask_id)
        return len(self._requests)

    async def collect(self) -> None:
        """Return when the metrics have what the worker has counted so far, or if it has ended or is starting."""
        if self._is_closed or not self.ready.is_set():
            return
        ask_id = next(self._ask_ids)
        reported = self._reports[ask_id] = asyncio.get_running_loop().create_future()
        self._send(ReportWanted(ask_id))
        await reported

    def probe(self) -> int:
        """Ask the worker, if it is ready, to report; return how many probes there were since it last sent anything."""
        self._num_unanswered += 1
        if self.ready.is_set():
            self._send(ReportWanted(next(self._ask_ids)))
        return self._num_unanswered

    def _told(self, ask_id: int) -> None:
        reported = self._reports.pop(ask_id, None)
        if reported is not None and not reported.done():
            reported.set_result(None)

    # ------------------------------------------------------------ requests

    def _submit(self) -> None:
        requests, self._submitted = self._submitted, []
        try:
            self._service.submit(requests, self._deliver)
        except KVRelayError as error:
            for request in requests:
                self._send(Deliver(request.request_id, RequestErrored.of(error)))
        else:
            self._requests.update(request.request_id for request in requests)

    def _deliver(self, request_id: RequestId, delivery: Delivery) -> None:
        if not isinstance(delivery, PARTS):
            self._requests.discard(request_id)
        if not self._is_closed:
            self._send(Deliver(request_id, delivery))

    # ------------------------------------------------------------ API keys

    def _take_use(self, message: UseWanted | UseCharged | UseEnded) -> None:
        match message:
            case UseWanted(ask_id=ask_id, key=key, max_requests=max_requests, tokens_per_minute=tokens_per_minute):
                use = self._uses.begin_now(ApiKey(key, b"", max_requests, tokens_per_minute))
                if use.wait_s == 0:
                    self._begun[ask_id] = use
                self._send(UseBegun(ask_id, use.wait_s, use.headers()))
            case UseCharged(ask_id=ask_id, num_tokens=num_tokens):
                self._begun[ask_id].charge(num_tokens)
            case UseEnded(ask_id=ask_id):
                begun = self._begun.pop(ask_id, None)
                if begun is not None:
                    begun.end()
            case _:
                assert_never(message)

    # ------------------------------------------------------------ questions

    async def _answer(self, asked: Asked) -> None:
        status, headers, body = await _get(self._state, asked.path, asked.query)
        if not self._is_closed:
            self._send(Answered(asked.ask_id, status, headers, body))


async def _get(app: ASGIApp, path: str, query: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return the answer of ``app`` to ``GET path?query``: status, headers, body."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": query, "headers": []}
    try:
        await app(scope, receive, send)
    except Exception:  # the border of the HTTP side: it is answered, like every request
        await send_internal_error(send, path)
    start, *parts = sent
    return start["status"], list(start["headers"]), b"".join(part.get("body", b"") for part in parts)
