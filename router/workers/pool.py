"""The worker processes of a router: started together, started again one by one, stopped together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from starlette.routing import Router

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.runtime.logging import log_event
from router.http.key_limits import KeyUses
from router.http.server import FLUSH_TIMEOUT_S
from router.http.state import state_routes
from router.metrics import Metrics
from router.service import RouterService
from router.workers.link import WorkerLink
from router.workers.messages import MaxModelLen, Serve, Start, ToWorker
from router.workers.names import name_of
from router.workers.process import Worker

SECTIONS = {"model", "engine", "router", "cluster"}
"""The sections of the config that a worker needs; the others have passwords and nodes."""

RESTART_DELAY_S = 1.0
"""Seconds until a worker that died young is started again; one that has lived so long is started at once."""

REPORT_TIMEOUT_S = 1.0
"""Seconds to wait for the counters of workers before metrics are read without those of one that hangs."""

PROBE_INTERVAL_S = 5.0
"""Seconds after which each worker is asked whether it still answers."""

MAX_UNANSWERED = 12
"""Probes without any message of a worker after which it is taken to hang.

They are counted, so that a long time in which the router itself does not run counts as one.
"""

MAX_UNANSWERED_AT_START = 120
"""The same for a worker that is not ready yet: it loads its modules and the tokenizer, and says nothing meanwhile.

Ten minutes: on a slow machine, with all workers starting at once, it takes a while.
"""

_KILL_AFTER_S = FLUSH_TIMEOUT_S + 3.0
_ANNOUNCE_INTERVAL_S = 0.2


def worker_config(config: ClusterConfig) -> ClusterConfig:
    """Return the config of one worker: that of a router without workers, with its share of what cannot be shared."""
    router, count = config.router, config.router.workers
    share: dict[str, Any] = {
        "workers": 1,
        "max_total_body_bytes": router.max_total_body_bytes // count,
        "preparation_workers": max(1, router.preparation_workers // count),
    }
    return config.model_copy(update={"router": router.model_copy(update=share)})


class WorkersFailedError(RuntimeError):
    """A worker ended before it could serve, when the router started."""


class Workers:
    """``config.router.workers`` processes that accept from ``listener``."""

    def __init__(self, service: RouterService, metrics: Metrics, listener: socket.socket) -> None:
        self._service = service
        self._metrics = metrics
        self._listener = listener
        self._uses = KeyUses(service.clock.now)
        self._state = Router(routes=state_routes(service, metrics, self.collect))
        self._config = msgspec.Raw(worker_config(service.config).model_dump_json(include=SECTIONS).encode())
        self._count = service.config.router.workers
        self._running: dict[int, Worker] = {}
        self._keepers: Sequence[asyncio.Task[None]] = ()
        """A task for each worker; see ``_keep``."""
        self._num_ready = 0
        self._all_ready, self._serving, self._stopping = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._announced = service.max_model_len

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start all workers; let them serve for the context; stop all. The service runs before it awaits anything.

        Raises WorkersFailedError if a worker cannot start.
        """
        self._listener.setblocking(False)
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(self._count)]
        watching = [asyncio.create_task(self._announce()), asyncio.create_task(self._probe())]
        try:
            await self._wait_until_ready()
            self._serving.set()  # they are told in a later turn of the loop, when the caller can take requests
            yield
        finally:
            for task in watching:
                task.cancel()
            await self._end()

    def status(self) -> list[dict[str, object]]:
        """Return the processes that run, for operators."""
        return [
            {"name": name_of(index), "pid": worker.pid, "num_requests": worker.link.num_requests}
            for index, worker in sorted(self._running.items())
        ]

    async def collect(self) -> None:
        """Return when the metrics have what all workers have counted so far, or one of them hangs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                await asyncio.gather(*(worker.link.collect() for worker in self._running.values()))

    # ------------------------------------------------------------ up

    async def _wait_until_ready(self) -> None:
        """Return when all workers are ready. Raises what has ended one of the keepers before."""
        ready = asyncio.create_task(self._all_ready.wait())
        try:
            done, _ = await asyncio.wait([ready, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
            if ready not in done:
                done.pop().result()
        finally:
            ready.cancel()

    async def _keep(self, index: int) -> None:
        """Run a worker, and another when it has ended, until all are stopped."""
        while not self._stopping.is_set():
            started_s = self._service.clock.now()
            ending = await self._live(index)
            if self._stopping.is_set():
                return
            if not self._serving.is_set():
                raise WorkersFailedError(f"{name_of(index)} {ending} before it could serve")
            log_event("error", "router worker ended; starting another", {"worker": name_of(index), "ending": ending})
            if self._service.clock.now() - started_s < RESTART_DELAY_S:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), RESTART_DELAY_S)

    async def _live(self, index: int) -> str:
        """Run a worker until it ends; return how it ended. Its requests are aborted."""
        start = Start(index, self._config, self._service.started_s, self._announced)
        try:
            worker = await Worker.start(start, self._listener, self._make_link)
        except OSError as error:  # too many processes, no memory: maybe only now
            return f"cannot be started: {error}"
        self._running[index] = worker
        serving = asyncio.create_task(self._serve_when_ready(worker))
        if self._stopping.is_set():
            worker.stop()
        try:
            code = await worker.ended()
        finally:
            serving.cancel()
            del self._running[index]
            num_aborted = worker.link.close()
        return f"exited with {code}, {num_aborted} requests aborted"

    async def _serve_when_ready(self, worker: Worker) -> None:
        await worker.link.ready.wait()
        self._num_ready += 1
        if self._num_ready == self._count:
            self._all_ready.set()
        await self._serving.wait()
        worker.send(MaxModelLen(self._announced))
        worker.send(Serve())

    def _make_link(self, send: Callable[[ToWorker], None]) -> WorkerLink:
        return WorkerLink(self._service, self._uses, self._metrics, self._state, send)

    async def _announce(self) -> None:
        """Tell all workers when the nodes that are there change the longest sequence."""
        while True:
            if self._announced != self._service.max_model_len:
                self._announced = self._service.max_model_len
                for worker in self._running.values():
                    worker.send(MaxModelLen(self._announced))
            await asyncio.sleep(_ANNOUNCE_INTERVAL_S)

    async def _probe(self) -> None:
        """Kill workers that hang: their clients wait for nothing, and what nodes send for them stays in memory.

        One that hangs while it starts would never be replaced, and one worker less would serve.
        """
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            for index, worker in self._running.items():
                is_ready = worker.link.ready.is_set()
                if worker.link.probe() > (MAX_UNANSWERED if is_ready else MAX_UNANSWERED_AT_START):
                    event = "router worker does not answer" if is_ready else "router worker does not start"
                    log_event("error", event, {"worker": name_of(index)})
                    worker.kill()

    # ------------------------------------------------------------ down

    async def finish(self) -> None:
        """Have all workers finish as ``HttpServer.finish`` says, and return when they have ended."""
        self._stop()
        await asyncio.wait(self._keepers)

    def _stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._listener.close()  # or what is in its queue is lost when the last worker ends; others may have it too
            for worker in self._running.values():
                worker.stop()

    async def _end(self) -> None:
        """End all workers, kill those that take too long, and return when none is left."""
        self._stop()
        for worker in self._running.values():
            worker.stop()
        await asyncio.wait(self._keepers, timeout=_KILL_AFTER_S)
        for worker in self._running.values():
            worker.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)
