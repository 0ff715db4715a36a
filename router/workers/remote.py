"""The worker's end: what its HTTP endpoints reach the machine by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from itertools import count
from typing import Any, TypeVar, assert_never

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import InvalidRequestError, QueueFullError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.ids import RequestId
from router.body_memory import BodyMemory
from router.client_metrics import ClientMetrics
from router.events import PARTS, ClientGone, Deliver, NewRequest, StopMatched
from router.frontend import Sink
from router.http.api_keys import ApiKey
from router.http.key_limits import Use
from router.model import ServedModel
from router.preparation_pool import Preparer
from router.workers.channel import MAX_UNSENT_BYTES, MAX_WEIGHT, Channel, weights
from router.workers.messages import (
    Answered,
    Asked,
    InProgress,
    InProgressAsked,
    MaxModelLen,
    Reply,
    Reported,
    ReportWanted,
    Serve,
    Start,
    Stop,
    Submission,
    ToWorker,
    UseBegun,
    UseCharged,
    UseEnded,
    UseWanted,
    WorkerMessage,
)

REPORT_INTERVAL_S = 1.0
"""Seconds after which what was counted is reported: so much is lost at most if this process is killed."""

R = TypeVar("R", bound=Reply)


def submissions(requests: Sequence[NewRequest]) -> Iterator[Submission]:
    """Yield messages with all ``requests``; only one with a single request has many more than ``MAX_WEIGHT`` tokens."""
    part: list[NewRequest] = []
    num_tokens = 0
    for request, weight in zip(requests, weights(requests), strict=True):
        if part and num_tokens + weight > MAX_WEIGHT:
            yield Submission(part, more=True)
            part, num_tokens = [], 0
        part.append(request)
        num_tokens += weight
    yield Submission(part)


class RemoteService:
    """The Frontend of a worker: its requests are in the router's machine."""

    def __init__(self, start: Start, config: ClusterConfig, model: ServedModel) -> None:
        self.config = config
        self.model = model
        self.clock = Clock()
        self.started_s = start.started_s
        self.preparer = Preparer(config, model)
        self.body_memory = BodyMemory(config.router.max_total_body_bytes, self.clock.now)
        self.metrics = ClientMetrics(self.clock.now)
        self.serving, self.stopping, self.ending = asyncio.Event(), asyncio.Event(), asyncio.Event()
        """Set by ``Serve``, by ``Stop``, which may come first (another worker could not start), and by its second."""
        self._max_model_len = start.max_model_len
        self.channel = Channel(ToWorker, self.receive)
        """The way to the router, to be opened."""
        self._sinks: dict[RequestId, Sink] = {}
        self._asked: dict[int, asyncio.Future[Reply]] = {}
        self._ask_ids = count(1)

    # ------------------------------------------------------------ Frontend

    @property
    def max_model_len(self) -> int:
        """See Frontend."""
        return self._max_model_len

    def submit(self, requests: Sequence[NewRequest], deliver: Sink) -> None:
        """See Frontend. Raises InvalidRequestError if an id is in use here, QueueFullError if the router hangs."""
        for request in requests:
            if request.request_id in self._sinks:
                raise InvalidRequestError(
                    f"a request with the id {request.request_id} is in progress", param="X-Request-Id"
                )
        if self.channel.num_unsent_bytes > MAX_UNSENT_BYTES:
            raise QueueFullError("the router does not read what its workers send")
        for request in requests:
            self._sinks[request.request_id] = deliver
        for submission in submissions(requests):
            self.channel.send(submission)

    async def any_in_progress(self, request_ids: Sequence[RequestId]) -> bool:
        """See Frontend."""
        if any(request_id in self._sinks for request_id in request_ids):
            return True
        ask_id = next(self._ask_ids)
        return (await self._ask(ask_id, InProgressAsked(ask_id, list(request_ids)), InProgress)).is_any

    def stop_matched(self, request_id: RequestId) -> None:
        """See Frontend."""
        self.channel.send(StopMatched(request_id))

    def client_disconnected(self, request_id: RequestId) -> None:
        """See Frontend."""
        self.channel.send(ClientGone(request_id))

    # ------------------------------------------------------------ what the router decides or knows

    async def begin(self, key: ApiKey) -> Use:
        """Begin a request with ``key`` if its limits, over all workers, allow. See ``router.http.key_limits.Uses``."""
        ask_id = next(self._ask_ids)
        wanted = UseWanted(ask_id, key.name, key.max_requests, key.tokens_per_minute)
        try:
            begun = await self._ask(ask_id, wanted, UseBegun)
        except asyncio.CancelledError:
            self.channel.send(UseEnded(ask_id))
            raise
        return RemoteUse(begun, self.channel.send)

    async def ask_router(self, request: Request) -> Response:
        """Return the router's answer to a GET of what only its machine knows."""
        ask_id = next(self._ask_ids)
        asked = Asked(ask_id, request.scope["path"], request.scope["query_string"])
        answer = await self._ask(ask_id, asked, Answered)
        response = Response(answer.body, answer.status)
        response.raw_headers = answer.headers
        return response

    async def timeline_of(self, request_id: RequestId) -> dict[str, Any] | None:
        """Return the timeline of a request in progress or recently ended, if the router keeps it."""
        ask_id = next(self._ask_ids)
        answer = await self._ask(ask_id, Asked(ask_id, f"/cluster/requests/{request_id}", b""), Answered)
        return msgspec.json.decode(answer.body, type=dict[str, Any]) if answer.status == HTTPStatus.OK else None

    async def _ask(self, ask_id: int, message: WorkerMessage, kind: type[R]) -> R:
        future = self._asked[ask_id] = asyncio.get_running_loop().create_future()
        self.channel.send(message)
        try:
            reply = await future
        finally:
            del self._asked[ask_id]
        assert isinstance(reply, kind)
        return reply

    # ------------------------------------------------------------ messages of the router

    def receive(self, message: ToWorker) -> None:
        """Handle a message of the router."""
        match message:
            case Deliver(request_id=request_id, delivery=delivery):
                is_part = isinstance(delivery, PARTS)
                sink = self._sinks[request_id] if is_part else self._sinks.pop(request_id)
                sink(request_id, delivery)
            case Answered() | InProgress() | UseBegun():
                self._take_reply(message)
            case MaxModelLen(num_tokens=num_tokens):
                self._max_model_len = num_tokens
            case ReportWanted(ask_id=ask_id):
                self.report(ask_id)
            case Serve():
                self.serving.set()
            case Stop():
                if self.stopping.is_set():
                    self.ending.set()
                self.stopping.set()
                self.serving.set()  # what waits for it goes on and finds that it is to stop
            case _:
                assert_never(message)

    def _take_reply(self, reply: Reply) -> None:
        future = self._asked.get(reply.ask_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def report(self, ask_id: int = 0) -> None:
        """Send what was counted since the last report; nothing if that is nothing and the router has not asked."""
        if ask_id or self.metrics.requests or self.metrics.output_tokens:
            self.channel.send(Reported(ask_id, self.metrics.take_report()))

    async def report_regularly(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self.report()


class RemoteUse:
    """One request with an API key; the router counts. The headers are as of its begin. See Use."""

    def __init__(self, begun: UseBegun, send: Callable[[WorkerMessage], None]) -> None:
        self.wait_s = begun.wait_s
        self._begun = begun
        self._send = send

    def headers(self) -> list[tuple[bytes, bytes]]:
        """See Use."""
        return self._begun.headers

    def charge(self, num_tokens: int) -> None:
        """See Use."""
        self._send(UseCharged(self._begun.ask_id, num_tokens))

    def end(self) -> None:
        """See Use."""
        self._send(UseEnded(self._begun.ask_id))
