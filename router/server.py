"""The router: machine and sockets on one event loop, with the HTTP server or with workers that have it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

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
from router.http.protocol import HttpLimits
from router.http.server import http_limits, http_server, tls_files
from router.http.state import state_routes
from router.memory import return_large_blocks
from router.metrics import Metrics
from router.model import load_model
from router.service import RouterService
from router.workers.pool import Workers

if TYPE_CHECKING:
    from router.tracing import Tracing

logger = logging.getLogger(__name__)

CLIENTS = "router.port"
"""The key of the address for clients. ``kvrelay up`` holds its socket, so that connections wait for the next router."""


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
    operators: ASGIApp = OperatorsOnly.of(config.router, make_operators_app(service))
    if config.router.access_log:
        operators = AccessLog(operators, clock.now)
    limits = http_limits(config.router)
    serving_clients: contextlib.AbstractAsyncContextManager[None] = (
        _serving_in_workers(service, metrics)
        if config.router.workers > 1
        else _serving_here(service, metrics, keys, tracing)
    )
    tune_gc()
    async with (
        serving_clients,
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


def _serving_here(
    service: RouterService, metrics: Metrics, keys: ApiKeys | None, tracing: Tracing | None
) -> contextlib.AbstractAsyncContextManager[None]:
    """Return a context in which this process serves clients."""
    router = service.config.router
    traced = [tracing.traced] if tracing else []
    app: ASGIApp = make_app(service, metrics, state_routes(service, metrics), keys, None, *traced)
    if router.access_log:
        app = AccessLog(app, service.clock.now)
    return _serving(app, CLIENTS, (router.host, router.port), http_limits(router), tls_files(router))


@contextlib.asynccontextmanager
async def _serving_in_workers(service: RouterService, metrics: Metrics) -> AsyncIterator[None]:
    """Serve clients in worker processes for the context."""
    router = service.config.router
    tls_files(router)  # if they are wrong, the router says so and not each worker
    startup.report("starting workers")
    with _listen(CLIENTS, router.host, router.port) as listener:
        workers = Workers(service, metrics, listener)
        service.http_workers = workers.status
        async with workers.serving():
            yield


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
