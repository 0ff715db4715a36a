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


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers; the shell installs its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


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
