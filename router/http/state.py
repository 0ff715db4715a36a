"""Endpoints that read the machine: readiness, metrics, state of the cluster, timelines of requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.phases import Phase, phases
from router.cluster_status import cluster_status
from router.http.admin import error_response
from router.http.app import CLUSTER_PATH, METRICS_PATH, READY_PATHS, TIMELINE_PATH
from router.metrics import Metrics
from router.openai.errors import AnswerError
from router.openai.field_types import shown
from router.service import RouterService


async def _nothing_to_collect() -> None:
    """The metrics are complete."""


def state_routes(
    service: RouterService, metrics: Metrics, collect: Callable[[], Awaitable[None]] = _nothing_to_collect
) -> Sequence[Route]:
    """Return the routes of ``router.http.app.STATE_PATHS``. ``collect`` completes the metrics before they are read."""
    state = StateEndpoints(service)

    async def exposition(_: Request) -> Response:
        """``GET /metrics`` in Prometheus' text format."""
        await collect()
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        *[Route(path, state.ready) for path in READY_PATHS],
        Route(METRICS_PATH, exposition),
        Route(CLUSTER_PATH, state.cluster),
        Route(TIMELINE_PATH, state.timeline),
    ]


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
