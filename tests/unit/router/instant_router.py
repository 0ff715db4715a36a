"""The router's HTTP application over a service that answers each request at once: no nodes, no sockets."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from fake_nodes import config
from starlette.types import ASGIApp

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.machine.clock import Clock
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason, PromptLogprobs, TokenLogprobs
from router.events import Delivery, NewRequest, PromptLogprobsDelivered, RequestEnded, TokensDelivered
from router.frontend import Sink
from router.http.app import make_app
from router.http.state import state_routes
from router.metrics import Metrics
from router.model import ServedModel, load_model
from router.preparation_pool import Preparer
from router.service import RouterService

MOST_TOKENS = 4


class InstantService(RouterService):
    """Gives each request up to four letters, each in a chunk of its own, and keeps what was submitted."""

    def __init__(self, settings: ClusterConfig, model: ServedModel) -> None:
        super().__init__(settings, model, Clock())
        self.submitted: list[NewRequest] = []
        self._delivering: set[asyncio.Task[None]] = set()

    def submit(self, requests: Sequence[NewRequest], sink: Sink) -> None:
        deliver = self._one_by_one(sink)
        self.submitted += requests
        for request in requests:
            count = min(MOST_TOKENS, request.sampling.max_tokens)
            top = request.sampling.num_logprobs
            for piece in _pieces(request):
                deliver(request.request_id, PromptLogprobsDelivered(piece))
            entry = [] if top is None else [TokenLogprobs(-0.5, list(range(top)), [-1.0] * top)]
            for index in range(count):
                finish = FinishReason.LENGTH if index == count - 1 else None
                deliver(request.request_id, TokensDelivered([65 + index], entry, finish_reason=finish))
            deliver(request.request_id, RequestEnded(FinishReason.LENGTH))

    def _one_by_one(self, sink: Sink) -> Sink:
        """Return a sink that passes to ``sink`` the next delivery when the one before has been taken."""
        waiting: asyncio.Queue[tuple[RequestId, Delivery]] = asyncio.Queue()

        async def pass_on() -> None:
            while True:
                sink(*await waiting.get())
                for _ in range(3):  # it wakes, takes it, and sends it
                    await asyncio.sleep(0)

        task = asyncio.get_running_loop().create_task(pass_on())
        self._delivering.add(task)
        task.add_done_callback(self._delivering.discard)
        return lambda request_id, delivery: waiting.put_nowait((request_id, delivery))

    def stop_matched(self, request_id: str) -> None:
        pass

    def client_disconnected(self, request_id: str) -> None:
        pass


def _pieces(request: NewRequest) -> Iterator[PromptLogprobs]:
    """Yield the logprobs of the prompt, two tokens at a time: that at position p has -p/2, as have its alternatives."""
    count, prompt = request.sampling.num_prompt_logprobs, request.prompt_token_ids
    for start in range(1, len(prompt) if count is not None else 0, 2):
        positions = range(start, min(start + 2, len(prompt)))
        yield PromptLogprobs(
            start,
            count or 0,
            array("i", [10 + position for position in positions]).tobytes(),
            array("i", [id for position in positions for id in (prompt[position], *range(count or 0))]).tobytes(),
            array("d", [-position / 2 for position in positions for _ in range(1 + (count or 0))]).tobytes(),
        )


class InstantRouter:
    """Asks the application."""

    def __init__(self, settings: ClusterConfig | None = None, **router: object) -> None:
        settings = settings or config(**router)
        self._settings = settings
        self._model = load_model(settings)
        self.service = InstantService(settings, self._model)
        self.metrics = Metrics(self.service.machine, self.service.clock.now)
        self.app: ASGIApp = make_app(self.service, self.metrics, state_routes(self.service, self.metrics))

    @property
    def last(self) -> NewRequest:
        """The newest request that was submitted."""
        return self.service.submitted[-1]

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the answer to one request."""

        async def ask() -> httpx.Response:
            self.service.preparer = Preparer(self._settings, self._model)  # its workers are tied to this event loop
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router") as client:
                try:
                    return await client.request(method, path, **options)
                finally:
                    await self.service.preparer.close()

        return asyncio.run(ask())

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        """Return the answer to ``body``."""
        return self.request("POST", path, json=body, **options)

    def answer(self, path: str, body: object) -> dict[str, Any]:
        """Return the answer to a request that must succeed, without what differs between equal ones."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return {name: value for name, value in answer.items() if name not in ("id", "created")}
