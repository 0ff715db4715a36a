"""The router: machine and sockets on one event loop, with the HTTP server or with workers that have it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

from starlette.types import ASGIApp

from kvrelay.addresses import is_loopback, listen_at, netloc
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError
from kvrelay.machine.clock import Clock
from kvrelay.protocol.ids import RequestId
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.runtime.listening import CONNECTION_BACKLOG, inherited_listener
from kvrelay.runtime.startup import READY, startup
from router.descriptors import raise_limit
from router.http.access_log import AccessLog
from router.http.api_keys import ApiKeys
from router.http.app import make_app
from router.http.operators import OperatorsOnly, make_operators_app
from router.http.protocol import HttpLimits
from router.http.server import HttpServer, http_limits, http_server, tls_files
from router.http.state import state_routes
from router.memory import return_large_blocks
from router.metrics import Metrics
from router.model import load_model
from router.service import Clients, RouterService
from router.traces import KEPT_TIMELINES, open_tracing, require_library
from router.workers.pool import Workers

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
    require_library(config.router)
    if config.router.otlp_endpoint is not None:
        service.machine.requests.timelines.max_kept = KEPT_TIMELINES
    operators: ASGIApp = OperatorsOnly.of(config.router, make_operators_app(service))
    if config.router.access_log:
        operators = AccessLog(operators, clock.now)
    limits = http_limits(config.router)
    in_workers = config.router.workers > 1
    async with (
        _serving_in_workers(service, metrics) if in_workers else _serving_here(service, metrics, keys) as clients,
        _serving(operators, "router.admin_port", config.router.admin_address, limits),
    ):
        tune_gc()
        startup.report(READY)
        return await service.run(clients)


@contextlib.asynccontextmanager
async def _serving_here(service: RouterService, metrics: Metrics, keys: ApiKeys | None) -> AsyncIterator[Clients]:
    """Serve clients in this process for the context."""
    router, timelines = service.config.router, service.machine.requests.timelines

    async def timeline_of(request_id: RequestId) -> dict[str, object] | None:
        return timelines.get(request_id)

    tracing = open_tracing(router, timeline_of)
    traced = [tracing.traced] if tracing else []
    app: ASGIApp = make_app(service, metrics, state_routes(service, metrics), keys, None, *traced)
    if router.access_log:
        app = AccessLog(app, service.clock.now)
    async with _serving(app, CLIENTS, (router.host, router.port), http_limits(router), tls_files(router)) as server:
        try:
            yield server
        finally:
            if tracing is not None:
                await tracing.close()


@contextlib.asynccontextmanager
async def _serving_in_workers(service: RouterService, metrics: Metrics) -> AsyncIterator[Clients]:
    """Serve clients in worker processes for the context."""
    router = service.config.router
    tls_files(router)  # if they are wrong, the router says so and not each worker
    startup.report("starting workers")
    with _listen(CLIENTS, router.host, router.port) as listener:
        workers = Workers(service, metrics, listener)
        service.http_workers = workers.status
        async with workers.serving():
            yield workers


@contextlib.asynccontextmanager
async def _serving(
    app: ASGIApp, key: str, address: tuple[str, int], limits: HttpLimits, tls: tuple[str, str] | None = None
) -> AsyncIterator[HttpServer]:
    """Serve ``app`` at ``address`` for the context. Raises ConfigError that names ``key`` if it is in use."""
    server = http_server(app, *address, limits, tls)
    with _listen(key, *address) as listener:
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield server
        finally:
            server.should_exit = True
            await task
