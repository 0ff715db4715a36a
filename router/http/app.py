"""The routes of the router's HTTP server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvrelay.protocol.messages.base import ErrorInfo
from router.client_metrics import ClientMetrics
from router.frontend import Frontend
from router.http.admin import AdminEndpoints, TokenEndpoint
from router.http.api_keys import ApiKeys
from router.http.clients_only import ClientsOnly
from router.http.error_format import error_body
from router.http.generate import GenerateEndpoint
from router.http.key_limits import KeyUses, Uses
from router.http.openapi import with_document
from router.http.unsupported import unsupported_routes
from router.openai.errors import AnswerError


class App:
    """Calls endpoints that are ASGI applications themselves, and Starlette for the rest.

    Starlette's layers cost each request, and each part of a stream. ``/x/`` is treated as ``/x``, because clients lose
    their body on a redirect. ``guard`` puts middleware before the routing.
    """

    def __init__(self, routes: Sequence[Route], guard: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> None:
        self.routes = routes
        self._posted = {route.path: route.app for route in routes if route.app is route.endpoint}
        self._starlette = Starlette(routes=routes, exception_handlers={HTTPException: http_error})
        self._guarded = guard(self._route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._guarded(scope, receive, send)

    def _route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = self._posted.get(scope["path"]) if scope["method"] == "POST" else None
        return (app or self._starlette)(scope, receive, send)


def _untraced(app: ASGIApp) -> ASGIApp:
    return app


def make_app(
    service: Frontend,
    metrics: ClientMetrics,
    state: Sequence[Route],
    keys: ApiKeys | None = None,
    uses: Uses | None = None,
    traced: Callable[[ASGIApp], ASGIApp] = _untraced,
) -> ASGIApp:
    """Return the HTTP application. ``state``: the routes of what only the machine knows, see ``router.http.state``.

    With ``keys`` it is for clients that have one, and ``uses`` is how much the keys use (default: what this application
    counts). ``traced`` wraps what generates. There is no middleware unless web pages may use the API or clients need
    keys: what it costs, it costs per token.
    """
    admin = AdminEndpoints(service)
    routes = [
        Route("/v1/completions", traced(GenerateEndpoint("completions", service, metrics)), methods=["POST"]),
        Route("/v1/chat/completions", traced(GenerateEndpoint("chat", service, metrics)), methods=["POST"]),
        Route("/v1/models", admin.models),
        Route("/v1/models/{model_id:path}", admin.model),
        Route("/tokenize", TokenEndpoint("tokenize", service), methods=["POST"]),
        Route("/detokenize", TokenEndpoint("detokenize", service), methods=["POST"]),
        Route("/tokenizer_info", admin.tokenizer_info),
        Route("/v1/responses", traced(GenerateEndpoint("responses", service, metrics)), methods=["POST"]),
        Route("/v1/responses/input_tokens", TokenEndpoint("responses_tokens", service), methods=["POST"]),
        Route("/v1/messages", traced(GenerateEndpoint("messages", service, metrics)), methods=["POST"]),
        Route("/v1/messages/count_tokens", TokenEndpoint("messages_tokens", service), methods=["POST"]),
        *[Route(path, admin.health) for path in ("/health", "/healthz", "/livez", "/ping")],
        Route("/version", admin.version),
        *state,
        *unsupported_routes(),
    ]

    def guard(app: ASGIApp) -> ASGIApp:
        if keys is not None:
            app = ClientsOnly(app, keys, uses or KeyUses(service.clock.now))
        return _cors(app, service.config.router.cors_allow_origins)

    return App(with_document(routes, "kvrelay"), guard)


def _cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Return ``app`` for web pages of these origins too."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


async def http_error(request: Request, error: Exception) -> Response:
    """Answer 404 and 405 of the routing in the format of all other errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = AnswerError(ErrorInfo(code=code, message=error.detail, http_status=error.status_code))
    return JSONResponse(error_body(answer, request.url.path), answer.status, headers=error.headers)
