"""Serves only clients with an API key, within the limits of their key. Not in use without keys."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.protocol.messages.base import ErrorInfo
from router.http.access_log import note_key
from router.http.api_keys import ApiKey, ApiKeys
from router.http.asgi import send_error
from router.http.key_limits import Use, Uses
from router.openai.choice import Choice, num_prompt_tokens
from router.openai.errors import AnswerError

OPEN = frozenset({"/health", "/healthz", "/livez", "/ping", "/ready", "/readyz"})
"""Paths that need no key: whether the process lives, and whether it can serve."""

_GENERATING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
_USE = "kvrelay.key_use"
_SCHEME = "bearer "


class ClientsOnly:
    """Middleware. ``uses``: what the keys use, of all processes that serve clients."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, uses: Uses) -> None:
        self._app = app
        self._keys = keys
        self._uses = uses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: 401 without a valid key, 429 beyond the limits of the key."""
        path = scope["path"]
        if path in OPEN or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        secrets = _secrets(Headers(scope=scope))
        key = next(filter(None, map(self._keys.find, secrets)), None)
        if key is None:
            error = _unauthorized(is_given=bool(secrets))
            await send_error(send, error, [(b"www-authenticate", b"Bearer")], path)
            return
        note_key(scope, key.name)
        if path in _GENERATING:
            await self._generate(key, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _generate(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        use = await self._uses.begin(key)
        if use.wait_s > 0:
            await send_error(send, _too_much(key, use.wait_s), use.headers(), scope["path"])
            return
        scope[_USE] = use

        def with_limits(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *use.headers()]
            return send(message)

        try:
            await self._app(scope, receive, with_limits)
        finally:
            use.end()


def charge(scope: Scope, choices: Sequence[Choice]) -> None:
    """Count the tokens of an answer for the client's key, if it has one."""
    use: Use | None = scope.get(_USE)
    if use is not None:
        use.charge(sum(choice.num_tokens for choice in choices) + num_prompt_tokens(choices))


def _secrets(headers: Headers) -> list[str]:
    """Return what may be the key: the bearer token, for OpenAI's clients, or ``x-api-key``, for Anthropic's."""
    bearer, plain = (
        headers.get(name, "").encode("latin-1").decode("utf-8", "replace") for name in ("authorization", "x-api-key")
    )
    secrets = [bearer[len(_SCHEME) :].strip()] if bearer.lower().startswith(_SCHEME) else []
    return [*secrets, plain.strip()] if plain else secrets


def _unauthorized(*, is_given: bool) -> AnswerError:
    message = (
        "the API key is not valid"
        if is_given
        else "an API key is required: Authorization: Bearer KEY, or x-api-key: KEY"
    )
    return AnswerError(ErrorInfo(code="invalid_api_key", message=message, http_status=401))


def _too_much(key: ApiKey, wait_s: float) -> AnswerError:
    if math.isinf(wait_s):
        message, wait_s = f"{key.max_requests} requests with this API key are in progress, its limit", 1.0
    else:
        message = f"the {key.tokens_per_minute} tokens a minute of this API key are used"
    error = ErrorInfo(code="rate_limit_exceeded", message=message, http_status=429)
    return AnswerError(error, retry_after_s=wait_s)
