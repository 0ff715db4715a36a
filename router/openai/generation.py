"""Everything one HTTP request has under way: its choices, from submission to the last delta."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from kvrelay.protocol.request import FinishReason
from router.events import Delivery, NewRequest, RequestEnded, RequestErrored, TokensDelivered
from router.openai.choice import Choice, Delta
from router.openai.errors import AnswerError
from router.turns import Turn


class ClientLeftError(Exception):
    """The client closed its connection: nobody is there to answer."""


class Backend(Protocol):
    """What serves requests: the router's service."""

    def submit(self, requests: Sequence[NewRequest], deliver: Callable[[str, Delivery], None]) -> None:
        """Have ``requests`` served; ``deliver(request_id, delivery)`` is called until each has ended."""

    def stop_matched(self, request_id: str) -> None:
        """No more tokens are wanted: the text has come to a stop string."""

    def client_gone(self, request_id: str) -> None:
        """Nobody waits for this request any more."""


class Observer(Protocol):
    """Who wants to know when a choice's tokens come: the metrics."""

    def tokens(self, choice: Choice, num_tokens: int) -> None:
        """Some tokens of ``choice`` came in at once."""

    def ended(self, choice: Choice, outcome: str) -> None:
        """``choice`` is over: ``ok``, ``aborted``, or the code of an error."""


class Generation:
    """The choices of one HTTP request. Whatever happens, ``close`` leaves none of them running."""

    def __init__(self, choices: Sequence[Choice], backend: Backend, observer: Observer) -> None:
        self._choices = {choice.request_id: choice for choice in choices}
        self._running = dict(self._choices)
        self._backend = backend
        self._observer = observer
        self._queue: asyncio.Queue[tuple[str, Delivery] | None] = asyncio.Queue()

    def start(self) -> None:
        """Submit all choices that want tokens. Raises InvalidRequestError if an id is in use."""
        requests = [choice.request for choice in self._choices.values()]
        wanted = [request for request in requests if request.sampling.max_tokens]
        if wanted:
            self._backend.submit(wanted, self._deliver)
        for request in requests:
            if not request.sampling.max_tokens:
                self._deliver(request.request_id, TokensDelivered([], finish_reason=FinishReason.LENGTH))

    def _deliver(self, request_id: str, delivery: Delivery) -> None:
        self._queue.put_nowait((request_id, delivery))

    def client_left(self) -> None:
        """Have ``deltas`` raise ClientLeftError."""
        self._queue.put_nowait(None)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield what comes in until every choice has finished.

        Raises AnswerError as soon as one choice fails, ClientLeftError if there is nobody to tell.
        """
        turn = Turn()
        while self._running:
            if self._queue.empty():
                item = await self._queue.get()
                turn.begin()
            else:
                item = self._queue.get_nowait()
                await turn.pause()
            if item is None:
                raise ClientLeftError
            request_id, delivery = item
            choice = self._running.get(request_id)
            if choice is None:
                continue
            if isinstance(delivery, RequestErrored):
                self._end(choice, delivery.error.code)
                raise AnswerError.of(delivery)
            if isinstance(delivery, RequestEnded):
                delivery = TokensDelivered([], finish_reason=delivery.finish_reason)
            yield self._take(choice, delivery)

    def close(self) -> None:
        """Give up the choices that are not done."""
        for choice in list(self._running.values()):
            self._backend.client_gone(choice.request_id)
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
