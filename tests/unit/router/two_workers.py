"""A router with two workers in one process: real channels, applications and machine, and nodes from a formula."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import msgspec
from fake_nodes import FakeCluster, Script, fake_cluster
from starlette.routing import Router

from router.http.api_keys import ApiKeys
from router.http.app import make_app
from router.http.key_limits import KeyUses
from router.http.state import asked_routes, state_routes
from router.metrics import Metrics
from router.workers.channel import Channel
from router.workers.link import WorkerLink
from router.workers.messages import FromWorker, Ready, Start, ToWorker
from router.workers.pool import worker_config
from router.workers.process import MakeLink
from router.workers.remote import RemoteService


@dataclass
class FakeWorker:
    """Both ends of a worker, and a client of it."""

    link: WorkerLink
    service: RemoteService
    client: httpx.AsyncClient
    channels: Sequence[Channel]

    async def die(self) -> None:
        """What happens when its process is killed."""
        for channel in self.channels:
            channel.abort()
        await asyncio.gather(*(channel.lost.wait() for channel in self.channels))
        self.link.close()


@dataclass
class TwoWorkers:
    router: FakeCluster
    a: FakeWorker
    b: FakeWorker


async def linked(end: socket.socket, make_link: MakeLink) -> tuple[WorkerLink, Channel]:
    """Return the router's end of a worker."""

    def send(message: ToWorker) -> None:
        channel.send(message)

    link = make_link(send)
    channel = Channel(FromWorker, link.receive)
    await channel.open(end)
    return link, channel


@asynccontextmanager
async def two_workers(script: Script | None = None, **router: object) -> AsyncIterator[TwoWorkers]:
    """Run them for the context. They serve through ASGI; a client that leaves is one whose task is cancelled."""
    async with fake_cluster(script, "prefill decode", workers=2, **router) as cluster:
        core = cluster.service
        metrics, uses = Metrics(core.machine, core.clock.now), KeyUses(core.clock.now)
        config = worker_config(core.config)
        workers: list[FakeWorker] = []

        async def collect() -> None:
            for worker in workers:
                await worker.link.collect()

        state = Router(state_routes(core, metrics, collect))
        for index in range(2):
            start = Start(index, msgspec.Raw(b"{}"), core.started_s, core.max_model_len)
            service = RemoteService(start, config, cluster.model)
            here, there = socket.socketpair()
            await service.channel.open(there)
            link, to_worker = await linked(here, partial(WorkerLink, core, uses, metrics, state))
            service.channel.send(Ready())
            await link.ready.wait()
            keys = ApiKeys.of(config.router, service.clock.now, env={})
            app = make_app(service, service.metrics, asked_routes(service.ask_router), keys, service)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router", timeout=None)
            workers.append(FakeWorker(link, service, client, [to_worker, service.channel]))
        try:
            yield TwoWorkers(cluster, *workers)
            await cluster.quiet()
        finally:
            for worker in workers:
                await worker.client.aclose()
                await worker.die()
                await worker.service.preparer.close()
