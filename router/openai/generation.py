"""The choices of one HTTP request, from submission to the last delta."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason
from kvrelay.runtime.time_slice import TimeSlice
from router.events import (
    PARTS,
    Delivery,
    NewRequest,
    PromptLogprobsDelivered,
    RequestEnded,
    RequestErrored,
    TokensDelivered,
)
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError

MAX_MERGED = 64
"""Deliveries of one choice that become one delta at most: a client that has been slow must not cost a long turn."""


def merged(deliveries: Sequence[TokensDelivered]) -> TokensDelivered:
    """Return consecutive deliveries of one request as one. Only the last may have a finish reason."""
    last = deliveries[-1]
    if len(deliveries) == 1:
        return last
    return TokensDelivered(
        [token_id for delivery in deliveries for token_id in delivery.token_ids],
        [logprobs for delivery in deliveries for logprobs in delivery.logprobs],
        last.num_cached_tokens,
        last.finish_reason,
        last.stop_token_id,
    )


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
    """The choices of one HTTP request. ``close`` aborts those that are still running.

    The backend is told nothing of a choice that has ended there: what a slow client has not read yet does not keep its
    id from the next request.

    Deliveries that wait until the client's turn comes are merged into one delta: where there is much to do, or the
    client is slow, deltas are fewer and larger. ``interval``: wait until a choice has this many new tokens, unless they
    are its first or last.
    """

    def __init__(self, choices: Sequence[Choice], backend: Backend, observer: Observer, *, interval: int = 1) -> None:
        self._choices = {choice.request_id: choice for choice in choices}
        self._running = dict(self._choices)
        self._submitted: set[RequestId] = set()
        self._backend = backend
        self._observer = observer
        self._interval = interval
        self._waiting: dict[RequestId, list[Delivery]] = {}
        self._wakeup: asyncio.Future[None] | None = None
        self._client_left = False

    def start(self) -> None:
        """Submit all choices with tokens to compute. Raises InvalidRequestError if an id is in use."""
        requests = [choice.request for choice in self._choices.values()]
        wanted = [request for request in requests if _is_computed(request)]
        if wanted:
            self._submitted.update(request.request_id for request in wanted)
            self._backend.submit(wanted, self._deliver)
        for request in requests:
            if not _is_computed(request):
                self._deliver(request.request_id, TokensDelivered([], finish_reason=FinishReason.LENGTH))

    def _deliver(self, request_id: RequestId, delivery: Delivery) -> None:
        if not isinstance(delivery, PARTS):
            self._submitted.discard(request_id)
        waiting = self._waiting.get(request_id)
        if waiting is None:
            waiting = self._waiting[request_id] = [delivery]
        else:
            waiting.append(delivery)
        if self._wakeup is not None and self._is_due(request_id, waiting):
            self._wake()

    def client_left(self) -> None:
        """Make ``deltas`` raise ClientLeftError."""
        self._client_left = True
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield deltas until every choice has finished.

        Raises AnswerError when a choice fails, ClientLeftError when the client disconnects.
        """
        loop, time_slice = asyncio.get_running_loop(), TimeSlice()
        while self._running:
            if self._client_left:
                raise ClientLeftError
            request_id = self._next_due()
            if request_id is None:
                self._wakeup = loop.create_future()
                await self._wakeup
                self._wakeup = None
                time_slice.begin()
                continue
            await time_slice.pause()
            delivery = self._take_merged(request_id)
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
            if choice.request_id in self._submitted:
                self._backend.client_disconnected(choice.request_id)
            self._end(choice, "aborted")

    # ------------------------------------------------------------ deliveries

    def _next_due(self) -> RequestId | None:
        """Return the choice that has waited longest of those whose deliveries are due."""
        if self._interval == 1:
            return next(iter(self._waiting), None)
        return next((name for name, waiting in self._waiting.items() if self._is_due(name, waiting)), None)

    def _is_due(self, request_id: RequestId, waiting: Sequence[Delivery]) -> bool:
        choice = self._running.get(request_id)
        if self._interval == 1 or choice is None or not choice.num_tokens:
            return True
        num_tokens = 0
        for delivery in waiting:
            if not isinstance(delivery, TokensDelivered) or delivery.finish_reason is not None:
                return True
            num_tokens += len(delivery.token_ids)
        return num_tokens >= self._interval

    def _take_merged(self, request_id: RequestId) -> Delivery:
        """Take the next deliveries of a choice, those with tokens as one."""
        waiting = self._waiting.pop(request_id)
        if len(waiting) == 1:
            return waiting[0]
        tokens: list[TokensDelivered] = []
        for delivery in waiting[:MAX_MERGED]:
            if not isinstance(delivery, TokensDelivered):
                break
            tokens.append(delivery)
        rest = waiting[len(tokens) or 1 :]
        if rest:
            self._waiting[request_id] = rest
        return merged(tokens) if tokens else waiting[0]

    def _take(self, choice: Choice, tokens: TokensDelivered) -> Delta:
        delta = choice.take(tokens)
        if delta.token_ids:
            self._observer.tokens(choice, len(delta.token_ids))
        if choice.stop_matched and choice.request_id in self._submitted:
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
