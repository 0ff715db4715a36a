"""One router process: HTTP server, machine and sockets on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.types import ASGIApp

from kvrelay.addresses import is_loopback, listen_at, netloc
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError
from kvrelay.machine.clock import Clock
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.runtime.listening import CONNECTION_BACKLOG, inherited_listener
from kvrelay.runtime.startup import READY, startup
from router.descriptors import raise_limit
from router.http.access_log import AccessLog
from router.http.api_keys import ApiKeys
from router.http.app import make_app
from router.http.operators import OperatorsOnly, make_operators_app
from router.http.protocol import HttpLimits, HttpProtocol
from router.memory import return_large_blocks
from router.metrics import Metrics
from router.model import load_model
from router.service import RouterService

if TYPE_CHECKING:
    from router.tracing import Tracing

logger = logging.getLogger(__name__)

CLIENTS = "router.port"
"""The key of the address for clients. ``kvrelay up`` holds its socket, so that connections wait for the next router."""

FLUSH_TIMEOUT_S = 5
"""Seconds clients may take to read the rest of their responses when the router stops."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers; the shell installs its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


def http_server(
    app: ASGIApp, host: str, port: int, limits: HttpLimits | None = None, tls: tuple[str, str] | None = None
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
    return HttpServer(settings)


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


def _listen(key: str, host: str, port: int) -> socket.socket:
    try:
        inherited = inherited_listener(host, port) if key == CLIENTS else None
        return inherited or listen_at(host, port, CONNECTION_BACKLOG)
    except OSError as error:
        raise ConfigError([f"{key}: cannot listen at {netloc(host, port)}: {error.strerror}"]) from error


async def serve(config: ClusterConfig) -> str:
    """Serve until stopped; return the reason.

    Raises CheckpointError if the tokenizer cannot be read, ConfigError if an address is in use.
    """
    for warning in config.warnings:
        logger.warning("%s", warning)
    clock = Clock()
    service = RouterService(config, load_model(config), clock)
    metrics = Metrics(service.machine, clock.now)
    raise_limit()
    return_large_blocks()
    keys = ApiKeys.of(config.router, clock.now)
    if keys is None and not is_loopback(config.router.host):
        logger.warning(
            "router.host: %s can be reached from other hosts, and clients need no API key", config.router.host
        )
    tracing = _tracing(service, config.router)
    clients: ASGIApp = make_app(service, metrics, keys, *([tracing.traced] if tracing else []))
    operators: ASGIApp = OperatorsOnly.of(config.router, make_operators_app(service))
    if config.router.access_log:
        clients, operators = AccessLog(clients, clock.now), AccessLog(operators, clock.now)
    limits, tls = http_limits(config.router), tls_files(config.router)
    tune_gc()
    async with (
        _serving(clients, CLIENTS, (config.router.host, config.router.port), limits, tls),
        _serving(operators, "router.admin_port", config.router.admin_address, limits),
    ):
        startup.report(READY)
        try:
            return await service.run()
        finally:
            if tracing is not None:
                await tracing.close()


def _tracing(service: RouterService, config: RouterConfig) -> Tracing | None:
    """Return what sends traces, or None. Raises ConfigError without the library."""
    if config.otlp_endpoint is None:
        return None
    try:
        from router.tracing import Tracing  # noqa: PLC0415 (an extra, which takes long to import)
    except ImportError as error:
        raise ConfigError(["router.otlp_endpoint needs OpenTelemetry: pip install 'kvrelay[otel]'"]) from error
    return Tracing(service, config.otlp_endpoint, config.trace_sample_ratio)


@contextlib.asynccontextmanager
async def _serving(
    app: ASGIApp, key: str, address: tuple[str, int], limits: HttpLimits, tls: tuple[str, str] | None = None
) -> AsyncIterator[None]:
    """Serve ``app`` at ``address`` for the context. Raises ConfigError that names ``key`` if it is in use."""
    server = http_server(app, *address, limits, tls)
    with _listen(key, *address) as listener:
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await task
