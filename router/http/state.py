"""Endpoints that read the machine: readiness, metrics, state of the cluster, timelines of requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.phases import Phase, phases
from router.cluster_status import cluster_status
from router.http.admin import error_response
from router.metrics import Metrics
from router.openai.errors import AnswerError
from router.openai.field_types import shown
from router.service import RouterService

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


async def _nothing_to_collect() -> None:
    """The metrics are complete."""


def state_routes(
    service: RouterService, metrics: Metrics, collect: Callable[[], Awaitable[None]] = _nothing_to_collect
) -> Sequence[Route]:
    """Return the routes by which clients read the machine. ``collect`` completes the metrics before they are read."""
    state, exposition = StateEndpoints(service), MetricsEndpoint(metrics, collect).exposition
    return _routes(
        ready=state.ready, load=state.load, metrics=exposition, cluster=state.cluster, timeline=state.timeline
    )


def asked_routes(ask: Endpoint) -> Sequence[Route]:
    """Return the same routes for a process that has no machine: ``ask`` answers all of them."""

    def asking(described: Callable[..., object]) -> Endpoint:
        @wraps(described)
        async def endpoint(request: Request) -> Response:
            return await ask(request)

        return endpoint

    return _routes(
        ready=asking(StateEndpoints.ready),
        load=asking(StateEndpoints.load),
        metrics=asking(MetricsEndpoint.exposition),
        cluster=asking(StateEndpoints.cluster),
        timeline=asking(StateEndpoints.timeline),
    )


def _routes(
    *, ready: Endpoint, load: Endpoint, metrics: Endpoint, cluster: Endpoint, timeline: Endpoint
) -> Sequence[Route]:
    return [
        *[Route(path, ready) for path in ("/ready", "/readyz")],
        Route("/load", load),
        Route("/metrics", metrics),
        Route("/cluster", cluster),
        Route("/cluster/requests/{request_id}", timeline),
    ]


class MetricsEndpoint:
    """Metrics, completed by ``collect`` before they are read."""

    def __init__(self, metrics: Metrics, collect: Callable[[], Awaitable[None]]) -> None:
        self._metrics = metrics
        self._collect = collect

    async def exposition(self, _: Request) -> Response:
        """``GET /metrics``: metrics in Prometheus' text format."""
        await self._collect()
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


class StateEndpoints:
    """Endpoints that are answered immediately and change nothing."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def ready(self, _: Request) -> Response:
        """``GET /ready``: 200 if a request would be served now, else 503 with the reason."""
        reason = self._service.machine.unready_reason()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return error_response(AnswerError(ErrorInfo(code="not_ready", message=reason, http_status=503)))

    async def load(self, _: Request) -> Response:
        """``GET /load``: how many requests are in progress, as in vLLM; each choice of an answer counts."""
        return JSONResponse({"server_load": len(self._service.machine.requests)})

    async def cluster(self, _: Request) -> Response:
        """``GET /cluster``: nodes with their load, requests by status, counters."""
        return JSONResponse(cluster_status(self._service, for_operators=False))

    async def timeline(self, request: Request) -> Response:
        """``GET /cluster/requests/{request_id}``: timeline of a request in progress or recently ended."""
        request_id = RequestId(request.path_params["request_id"])
        timeline = self._service.machine.requests.timelines.get(request_id)
        if timeline is None:
            message = f"no request {shown(request_id)} is in progress or among the last that ended"
            return error_response(AnswerError(ErrorInfo(code="not_found", message=message, http_status=404)))
        return JSONResponse({**timeline, "phases": [_phase(phase) for phase in phases(timeline)]})


def _phase(phase: Phase) -> dict[str, object]:
    return {"name": phase.name, "node": phase.node, "start_s": phase.start_s, "duration_s": phase.duration_s}
