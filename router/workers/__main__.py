"""``python -m router.workers CHANNEL LISTENER``: a worker, started by the router with these two descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import msgspec
import setproctitle
import uvloop
from starlette.types import ASGIApp

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.runtime.logging import set_up_logging
from kvrelay.runtime.parent import end_with_parent
from router.descriptors import raise_limit
from router.http.access_log import AccessLog
from router.http.api_keys import ApiKeys
from router.http.app import make_app
from router.http.server import http_limits, http_server, tls_files
from router.http.shared_listener import SharingServer
from router.http.state import asked_routes
from router.memory import return_large_blocks
from router.model import load_model
from router.traces import open_tracing
from router.workers.channel import Channel
from router.workers.messages import Ready, Start
from router.workers.names import name_of
from router.workers.remote import RemoteService


def main() -> None:
    """Serve until the router stops this worker or ends. Stop signals are for the router."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, listener = (_taken(argument) for argument in sys.argv[1:])
    start = msgspec.json.decode(sys.stdin.buffer.read(), type=Start)
    config = ClusterConfig.model_validate_json(bytes(start.config))
    setproctitle.setproctitle(f"kvrelay router worker {start.index}")
    set_up_logging(name_of(start.index), config.cluster.log_level, config.cluster.log_format)
    raise_limit()
    return_large_blocks()
    uvloop.run(serve(start, config, channel, listener))


def _taken(descriptor: str) -> socket.socket:
    """Return the socket of an inherited descriptor, which this process's children do not get."""
    taken = socket.socket(fileno=int(descriptor))
    taken.set_inheritable(False)
    return taken


async def serve(start: Start, config: ClusterConfig, channel_end: socket.socket, listener: socket.socket) -> None:
    """Serve clients at ``listener`` until the router says to stop."""
    service = RemoteService(start, config, load_model(config))
    channel = service.channel
    await channel.open(channel_end)
    keys = ApiKeys.of(config.router, service.clock.now)
    tracing = open_tracing(config.router, service.timeline_of)
    traced = [tracing.traced] if tracing else []
    app: ASGIApp = make_app(service, service.metrics, asked_routes(service.ask_router), keys, service, *traced)
    if config.router.access_log:
        app = AccessLog(app, service.clock.now)
    address = config.router.host, config.router.port
    server = http_server(app, *address, http_limits(config.router), tls_files(config.router), SharingServer)
    tune_gc()
    ending = asyncio.create_task(_end_with_router(channel))
    reporting = asyncio.create_task(service.report_regularly())
    channel.send(Ready())
    await service.serving.wait()
    if not service.stopping.is_set():  # another worker could not start, and nobody is to be served
        serving = asyncio.create_task(server.serve([listener]))
        await service.stopping.wait()
        finishing = asyncio.create_task(server.finish()), asyncio.create_task(service.ending.wait())
        await asyncio.wait(finishing, return_when=asyncio.FIRST_COMPLETED)
        for task in finishing:
            task.cancel()
        server.should_exit = True
        await serving
    await service.preparer.close()
    if tracing is not None:
        await tracing.close()
    for task in (ending, reporting):
        task.cancel()
    service.report()
    await channel.close()


async def _end_with_router(channel: Channel) -> None:
    """End at once when the router has ended: nothing can be finished without it."""
    await channel.lost.wait()
    os._exit(1)


if __name__ == "__main__":
    main()
