"""uvicorn's server with our protocol, limits and TLS files."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError
from router.http.protocol import HttpLimits, HttpProtocol

FLUSH_TIMEOUT_S = 5
"""Seconds clients may take to read the rest of their responses when the router stops."""

IDLE_GRACE_S = 1.0
"""Seconds for which a server that finishes leaves idle connections open: their next request may be on its way."""

_POLL_S = 0.05


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, as the shell installs its own, and with an end that loses no request."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def finish(self) -> None:
        """Accept nothing more, answer what comes on the open connections, and return when all have ended.

        Each ends with the next answer that says so, or when it has been idle for ``IDLE_GRACE_S``. There is no limit
        for answers: ``should_exit`` sets one.
        """
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        for server in self.servers:
            server.close()
        # Not among the connections: those whose TLS handshake is not over, and in the first turns those just accepted.
        until_s = loop.time() + (IDLE_GRACE_S if self.config.is_ssl else _POLL_S)
        while self.server_state.connections or loop.time() < until_s:
            for connection in list(self.server_state.connections):
                cast(HttpProtocol, connection).finish(IDLE_GRACE_S)
            await asyncio.sleep(_POLL_S)


def http_server(
    app: ASGIApp,
    host: str,
    port: int,
    limits: HttpLimits | None = None,
    tls: tuple[str, str] | None = None,
    kind: type[HttpServer] = HttpServer,
) -> HttpServer:
    """Return a server for ``app`` that is not running yet. ``tls``: files of its certificate chain and private key."""
    certificate, private_key = tls or (None, None)
    # uvicorn only calls the protocol class, so a partial works.
    protocol = cast(type[asyncio.Protocol], partial(HttpProtocol, limits=limits or HttpLimits()))
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        date_header=False,
        server_header=False,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
    )
    return kind(settings)


def http_limits(config: RouterConfig) -> HttpLimits:
    """Return the limits of one HTTP connection set in ``config``."""
    return HttpLimits(config.max_header_bytes, config.request_read_timeout_s, config.keep_alive_timeout_s)


def tls_files(config: RouterConfig) -> tuple[str, str] | None:
    """Return the files of certificate and private key, or None without TLS. Raises ConfigError if they do not fit."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"router.tls_certificate, tls_key: {error}"]) from error
    return config.tls_certificate, config.tls_key
