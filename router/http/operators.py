"""The operators' HTTP server: the whole state of the cluster, and what changes it. Its address is not the clients'."""

from __future__ import annotations

import hashlib
import hmac
import json
import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvrelay.addresses import is_loopback, is_named
from kvrelay.admin_key import VARIABLE, read_admin_key
from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError, NoNodeError
from kvrelay.protocol.ids import RequestId, peer_name
from kvrelay.protocol.messages.base import ErrorInfo
from router.cluster_status import cluster_status
from router.http.admin import AdminEndpoints
from router.http.app import App
from router.http.asgi import send_error
from router.http.dashboard import PATH, Dashboard
from router.http.dumps import DumpEndpoints
from router.http.openapi import Queries, with_document
from router.http.state import StateEndpoints
from router.openai.errors import AnswerError
from router.openai.field_types import shown
from router.server_info import server_info
from router.service import RouterService
from router.timeline import MAX_KEPT

_SCHEME = "bearer "
_DEFAULT_LIMIT = 50
_LIMIT = re.compile(r"[0-9]{1,4}")
_FORMATS = ("json", "text")
_FORMAT = {"config_format": {"type": "string", "enum": list(_FORMATS), "default": _FORMATS[0]}}
_PROMPTS = {"prompts": {"type": "boolean", "default": False}}
_QUERIES: Queries = {
    "/cluster/requests": {"limit": {"type": "integer", "minimum": 1, "maximum": MAX_KEPT, "default": _DEFAULT_LIMIT}},
    "/server_info": _FORMAT,
    "/get_server_info": _FORMAT,
    **dict.fromkeys(("/cluster/dump", "/cluster/nodes/{node_id}/dump"), _PROMPTS),
}


class OperatorsOnly:
    """Serves ``app`` to those who have the key, in ``Authorization: Bearer``; without a key to whoever reaches it.

    A browser that shows a page of somebody else's reaches loopback too. What pages send has an ``Origin``: refused.
    A page whose name its owner lets point to this host may read without one, so that without a key ``Host`` must be an
    address, or localhost.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = _digest(key) if key is not None else None

    @classmethod
    def of(cls, config: RouterConfig, app: ASGIApp) -> OperatorsOnly:
        """Return the guard that ``config`` wants. Raises ConfigError if there must be a key and is none."""
        key = read_admin_key(config.admin_key_file)
        host, _ = config.admin_address
        if key is None and not is_loopback(host):
            raise ConfigError([f"router.admin_host: {host} is not loopback: set router.admin_key_file or {VARIABLE}"])
        return cls(app, key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is None:
            await self._app(scope, receive, send)
        else:
            challenge = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            await send_error(send, error, challenge)

    def _refusal(self, path: str, headers: Headers) -> AnswerError | None:
        if "origin" in headers:
            return _error("forbidden", "web pages may not use the operators' endpoints", 403)
        if self._digest is None:
            if is_named(headers.get("host", "")):
                return _error("forbidden", "without a key, Host must be an IP address or localhost", 403)
            return None
        if path == PATH:  # a browser has no key yet when it loads the page, which asks for it
            return None
        given = headers.get("authorization", "")
        key = given[len(_SCHEME) :].strip() if given.lower().startswith(_SCHEME) else ""
        if hmac.compare_digest(_digest(key), self._digest):
            return None
        return _error("unauthorized", "the operators' key is missing or wrong", 401)


def make_operators_app(service: RouterService) -> App:
    """Return the application, which lets everybody in: see ``OperatorsOnly``."""
    info, state, endpoints = AdminEndpoints(service), StateEndpoints(service), OperatorEndpoints(service)
    dumps = DumpEndpoints(service)
    routes = [
        Route("/health", info.health),
        Route("/ready", state.ready),
        Route(PATH, Dashboard().page),
        Route("/cluster", endpoints.cluster),
        Route("/cluster/requests", endpoints.requests),
        Route("/cluster/requests/{request_id}", state.timeline),
        Route("/cluster/requests/{request_id}", endpoints.cancel, methods=["DELETE"]),
        Route("/cluster/nodes/{node_id}/drain", endpoints.drain, methods=["POST"]),
        Route("/cluster/nodes/{node_id}/stop", endpoints.stop, methods=["POST"]),
        Route("/cluster/nodes/{node_id}/dump", dumps.node, methods=["POST"]),
        Route("/cluster/dump", dumps.router, methods=["POST"]),
        *[Route(path, endpoints.server_info) for path in ("/server_info", "/get_server_info")],
        *[Route(path, endpoints.reset_cache, methods=["POST"]) for path in ("/reset_prefix_cache", "/flush_cache")],
    ]
    return App(with_document(routes, "kvrelay for operators", _QUERIES))


class OperatorEndpoints:
    """Endpoints that clients do not have."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def cluster(self, _: Request) -> Response:
        """``GET /cluster``: as for clients, and each node's address, pid and incarnation."""
        return JSONResponse(cluster_status(self._service, for_operators=True))

    async def requests(self, request: Request) -> Response:
        """``GET /cluster/requests?limit=N``: the newest requests whose timelines are kept, those in progress first."""
        given = request.query_params.get("limit", str(_DEFAULT_LIMIT))
        limit = int(given) if _LIMIT.fullmatch(given) else 0
        if not 1 <= limit <= MAX_KEPT:
            error = _error("invalid_request_error", f"limit should be 1 to {MAX_KEPT}, not {shown(given)}", 400)
            return JSONResponse(error.body, error.status)
        its = self._service.machine.requests
        listed = its.timelines.newest(limit)
        for item in listed:
            if item["done_s"] is None:  # its nodes have not reported yet, but the router has chosen them
                item["nodes"] = [peer_name(peer) for peer in its.nodes_of(RequestId(str(item["request_id"])))]
        return JSONResponse({"requests": listed, "now_s": self._service.clock.now()})

    async def cancel(self, request: Request) -> Response:
        """``DELETE /cluster/requests/{request_id}``: both nodes drop it, and its client gets 410 ``request_cancelled``.

        The answer names each choice that was in progress and its status then.
        """
        name = request.path_params["request_id"]
        found = self._service.machine.requests.named(name)
        if not found:
            error = _error("not_found", f"no request {shown(name)} is in progress", 404)
            return JSONResponse(error.body, error.status)
        for item in found:
            self._service.cancel(item.request_id)
        requests = [{"request_id": item.request_id, "state": item.status.value} for item in found]
        return JSONResponse({"status": "cancelled", "requests": requests})

    async def server_info(self, request: Request) -> Response:
        """``GET /server_info?config_format=json|text``: version, model and config, without secrets."""
        wanted = request.query_params.get("config_format", _FORMATS[0])
        if wanted not in _FORMATS:
            error = _error("invalid_request_error", f"config_format should be json or text, not {shown(wanted)}", 400)
            return JSONResponse(error.body, error.status)
        info = server_info(self._service)
        if wanted == "text":
            info["kvrelay_config"] = json.dumps(info["kvrelay_config"])
        return JSONResponse(info)

    async def reset_cache(self, _: Request) -> Response:
        """``POST /reset_prefix_cache``: no prompt finds KV in a prefix cache that was there before.

        200 with what became of it on each node if all have done it, else 503 with the same.
        """
        try:
            nodes = await self._service.reset_prefix_caches()
        except NoNodeError as reason:
            error = AnswerError.of(reason)
            return JSONResponse(error.body, error.status)
        answers = {"nodes": [{"name": node.node_id, "state": node.state, "blocks": node.num_blocks} for node in nodes]}
        left = [node.node_id for node in nodes if node.state != "reset"]
        if not left:
            return JSONResponse({"status": "reset", **answers})
        error = _error("reset_incomplete", f"not reset, or not known to be: {', '.join(left)}", 503)
        return JSONResponse({**error.body, **answers}, error.status)

    async def drain(self, request: Request) -> Response:
        """``POST /cluster/nodes/{node_id}/drain``: it gets no new requests, finishes its own and ends.

        ``kvrelay up`` starts it again.
        """
        return self._drain(request, stay_down=False)

    async def stop(self, request: Request) -> Response:
        """``POST /cluster/nodes/{node_id}/stop``: as drain, and ``kvrelay up`` does not start it again."""
        return self._drain(request, stay_down=True)

    def _drain(self, request: Request, *, stay_down: bool) -> Response:
        node_id = request.path_params["node_id"]
        if self._service.machine.node_table.named(node_id) is None:
            error = _error("not_found", f"no node is called {shown(node_id)}", 404)
            return JSONResponse(error.body, error.status)
        self._service.drain(node_id, stay_down=stay_down)
        return JSONResponse({"status": "draining"}, 202)


def _error(code: str, message: str, status: int) -> AnswerError:
    return AnswerError(ErrorInfo(code=code, message=message, http_status=status))


def _digest(key: str) -> bytes:
    """Return a digest: keys are compared in a time that tells nothing of their length either."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()
