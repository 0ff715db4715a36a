"""All routes of the router."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvrelay.core.messages.base import ErrorInfo
from router.http.admin import AdminEndpoints, TokenEndpoint
from router.http.generate import GenerateEndpoint
from router.metrics import Metrics
from router.openai.chat import ChatCompletions
from router.openai.completions import Completions
from router.openai.errors import AnswerError
from router.service import RouterService


def make_app(service: RouterService, metrics: Metrics) -> Starlette:
    """Return the HTTP application. There is no middleware: what it would cost, it would cost per token."""
    admin = AdminEndpoints(service, metrics)
    completions = GenerateEndpoint(Completions(service.model), service, metrics)
    chat = GenerateEndpoint(ChatCompletions(service.model), service, metrics)
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", admin.models),
        Route("/v1/models/{model_id:path}", admin.model),
        Route("/tokenize", TokenEndpoint(service, back=False), methods=["POST"]),
        Route("/detokenize", TokenEndpoint(service, back=True), methods=["POST"]),
        Route("/tokenizer_info", admin.tokenizer_info),
        Route("/health", admin.health),
        Route("/ready", admin.ready),
        Route("/version", admin.version),
        Route("/metrics", admin.metrics),
        Route("/cluster", admin.cluster),
        Route("/cluster/requests/{request_id}", admin.timeline),
        Route("/cluster/nodes/{node_id}/drain", admin.drain, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


async def _http_error(_: Request, error: Exception) -> Response:
    """Answer 404 and 405 of the routing in the form of all other errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = AnswerError(ErrorInfo(code=code, message=error.detail, http_status=error.status_code))
    return JSONResponse(answer.body, answer.status, headers=error.headers)
