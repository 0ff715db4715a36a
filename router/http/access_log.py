"""The access log: one line per HTTP request, including failed ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.runtime.logging import log_event
from router.openai.choice import Choice, usage

PROBES = frozenset({"/health", "/healthz", "/livez", "/ping", "/ready", "/readyz", "/metrics", "/cluster"})
"""Paths of periodic probes, logged at level debug only, unless somebody is not let in."""

_NOT_LET_IN = (401, 403)

CLIENT_LEFT = 499
"""Logged status of a request whose client disconnected before the answer, as in nginx."""

_ENTRY = "kvrelay.access_entry"
_MAX_PATH_CHARS = 200


@dataclass(slots=True)
class _Entry:
    """Data of one request for its log line."""

    started_s: float
    status: int = CLIENT_LEFT
    is_complete: bool = False
    fields: dict[str, object] = field(default_factory=dict)

    def see(self, message: Message) -> None:
        """Record a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            request_id = dict(message.get("headers", ())).get(b"x-request-id")
            if request_id is not None:
                self.fields["request_id"] = request_id.decode("latin-1")
        elif not message.get("more_body", False):
            self.is_complete = True


class AccessLog:
    """Serves ``app`` and logs method, path, status, duration and, if known, request id and tokens of each request.

    A part of a stream costs one more function call.
    """

    def __init__(self, app: ASGIApp, now: Callable[[], float]) -> None:
        self._app = app
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        entry = scope[_ENTRY] = _Entry(self._now())

        def watched(message: Message) -> Awaitable[None]:
            entry.see(message)
            return send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._log(scope, entry)

    def _log(self, scope: Scope, entry: _Entry) -> None:
        path, client = scope["path"], scope.get("client")
        fields: dict[str, object] = {
            "method": scope["method"],
            "path": path if len(path) <= _MAX_PATH_CHARS else path[:_MAX_PATH_CHARS] + "...",
            "status": entry.status,
            "duration_s": self._now() - entry.started_s,
            **entry.fields,
        }
        if client:
            fields["client"] = client[0]
        if not entry.is_complete:
            fields["client_left"] = True
        is_probe = (path in PROBES or _is_polled(scope)) and entry.status not in _NOT_LET_IN
        log_event("debug" if is_probe else "info", "http request", fields)


def _is_polled(scope: Scope) -> bool:
    """Return whether it is what the dashboard asks once per second."""
    return scope["method"] == "GET" and f"{scope['path']}/".startswith("/cluster/requests/")


def note_key(scope: Scope, name: str) -> None:
    """Add the name of the client's API key to the log line of this request, if there is an access log."""
    entry: _Entry | None = scope.get(_ENTRY)
    if entry is not None:
        entry.fields["key"] = name


def note_tokens(scope: Scope, choices: Sequence[Choice]) -> None:
    """Add token counts to the log line of this request, if there is an access log."""
    entry: _Entry | None = scope.get(_ENTRY)
    if entry is not None:
        counts = usage(choices)
        entry.fields |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
