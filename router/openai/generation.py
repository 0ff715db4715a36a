"""The choices of one HTTP request, from submission to the last delta."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason
from kvrelay.runtime.time_slice import TimeSlice
from router.events import (
    Delivery,
    NewRequest,
    PromptLogprobsDelivered,
    RequestEnded,
    RequestErrored,
    TokensDelivered,
)
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError


class ClientLeftError(Exception):
    """The client has closed its connection."""


class Backend(Protocol):
    """Interface of the router's service."""

    def submit(self, requests: Sequence[NewRequest], deliver: Callable[[RequestId, Delivery], None]) -> None:
        """Submit ``requests``. ``deliver(request_id, delivery)`` is called until each has ended."""

    def stop_matched(self, request_id: RequestId) -> None:
        """End a request whose text has reached a stop string."""

    def client_disconnected(self, request_id: RequestId) -> None:
        """Abort a request whose client has disconnected."""


class Observer(Protocol):
    """Observer of tokens, for metrics."""

    def tokens(self, choice: Choice, num_tokens: int) -> None:
        """Called when tokens of ``choice`` arrive."""

    def ended(self, choice: Choice, outcome: str) -> None:
        """Called when ``choice`` has ended: ``ok``, ``aborted``, or the code of an error."""


class Generation:
    """The choices of one HTTP request. ``close`` aborts those that are still running."""

    def __init__(self, choices: Sequence[Choice], backend: Backend, observer: Observer) -> None:
        self._choices = {choice.request_id: choice for choice in choices}
        self._running = dict(self._choices)
        self._backend = backend
        self._observer = observer
        self._queue: asyncio.Queue[tuple[RequestId, Delivery] | None] = asyncio.Queue()

    def start(self) -> None:
        """Submit all choices with tokens to compute. Raises InvalidRequestError if an id is in use."""
        requests = [choice.request for choice in self._choices.values()]
        wanted = [request for request in requests if _is_computed(request)]
        if wanted:
            self._backend.submit(wanted, self._deliver)
        for request in requests:
            if not _is_computed(request):
                self._deliver(request.request_id, TokensDelivered([], finish_reason=FinishReason.LENGTH))

    def _deliver(self, request_id: RequestId, delivery: Delivery) -> None:
        self._queue.put_nowait((request_id, delivery))

    def client_left(self) -> None:
        """Make ``deltas`` raise ClientLeftError."""
        self._queue.put_nowait(None)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield deltas until every choice has finished.

        Raises AnswerError when a choice fails, ClientLeftError when the client disconnects.
        """
        time_slice = TimeSlice()
        while self._running:
            if self._queue.empty():
                item = await self._queue.get()
                time_slice.begin()
            else:
                item = self._queue.get_nowait()
                await time_slice.pause()
            if item is None:
                raise ClientLeftError
            request_id, delivery = item
            choice = self._running.get(request_id)
            if choice is None:
                continue
            if isinstance(delivery, RequestErrored):
                self._end(choice, delivery.error.code)
                raise AnswerError.of(delivery)
            if isinstance(delivery, PromptLogprobsDelivered):
                yield Delta(choice.index, "", [], prompt_logprobs=delivery.logprobs)
                continue
            if isinstance(delivery, RequestEnded):
                delivery = TokensDelivered([], finish_reason=delivery.finish_reason)
            yield self._take(choice, delivery)

    def close(self) -> None:
        """Abort the choices that have not finished."""
        for choice in list(self._running.values()):
            self._backend.client_disconnected(choice.request_id)
            self._end(choice, "aborted")

    def _take(self, choice: Choice, tokens: TokensDelivered) -> Delta:
        delta = choice.take(tokens)
        if delta.token_ids:
            self._observer.tokens(choice, len(delta.token_ids))
        if choice.stop_matched:
            self._backend.stop_matched(choice.request_id)
        if choice.finished:
            self._end(choice, "ok")
        return delta

    def _end(self, choice: Choice, outcome: str) -> None:
        del self._running[choice.request_id]
        self._observer.ended(choice, outcome)


def _is_computed(request: NewRequest) -> bool:
    """Return whether a node has anything to do for ``request``."""
    return request.sampling.max_tokens > 0 or request.sampling.num_prompt_logprobs is not None
