"""The worker processes of a router, without processes: all serve or none, each is replaced, all are stopped."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from fake_nodes import config, until, until_refused

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.machine.clock import Clock
from router.client_metrics import ClientMetrics
from router.metrics import Metrics
from router.model import load_model
from router.service import RouterService
from router.workers import pool, process
from router.workers.link import WorkerLink
from router.workers.messages import (
    Answered,
    FromWorker,
    MaxModelLen,
    Reported,
    ReportWanted,
    Serve,
    Start,
    Stop,
    ToWorker,
)
from router.workers.pool import Workers, WorkersFailedError, worker_config
from router.workers.process import MakeLink, Worker


@dataclass
class FakeProcess:
    """A worker that ends when it is told to, or killed."""

    start: Start
    make_link: MakeLink
    pid: int = 1
    sent: list[ToWorker] = field(default_factory=list)
    obeys: bool = True
    hangs: bool = False

    def __post_init__(self) -> None:
        self.end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.link: WorkerLink = self.make_link(self.send)

    def send(self, message: ToWorker) -> None:
        if isinstance(message, ReportWanted) and not self.hangs:
            self.link.receive(Reported(message.ask_id, ClientMetrics(lambda: 0.0).take_report()))
        self.sent.append(message)

    def stop(self) -> None:
        self.send(Stop())
        if self.obeys and not self.end.done():
            self.end.set_result(0)

    def kill(self) -> None:
        if not self.end.done():
            self.end.set_result(-9)

    async def ended(self) -> int:
        return await self.end


class Processes:
    """All that were started, in order. ``refusals``: how many starts fail first."""

    def __init__(self) -> None:
        self.started: list[FakeProcess] = []
        self.refusals = 0

    async def start(self, start: Start, _: socket.socket, make_link: MakeLink) -> FakeProcess:
        if self.refusals:
            self.refusals -= 1
            raise OSError("no memory")
        self.started.append(FakeProcess(start, make_link))
        return self.started[-1]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    found = Processes()
    monkeypatch.setattr(Worker, "start", found.start)
    monkeypatch.setattr(pool, "RESTART_DELAY_S", 0.0)
    yield found


def run(check: Callable[[Workers], Awaitable[None]]) -> None:
    async def bounded() -> None:
        settings, clock = config("mixed", workers=3), Clock()
        service = RouterService(settings, load_model(settings), clock)
        with socket.socket() as listener:
            await asyncio.wait_for(check(Workers(service, Metrics(service.machine, clock.now), listener)), 30)

    asyncio.run(bounded())


async def all_ready(processes: Processes, count: int) -> None:
    await until(lambda: len(processes.started) == count)
    for one in processes.started:
        one.link.ready.set()


def kinds(one: FakeProcess) -> list[type]:
    return [type(message) for message in one.sent]


def test_none_serves_before_all_can(processes: Processes) -> None:
    async def check(workers: Workers) -> None:
        async def serve() -> None:
            async with workers.serving():
                await until(lambda: all(Serve() in one.sent for one in processes.started))
                assert [worker["name"] for worker in workers.status()] == ["router-0", "router-1", "router-2"]

        serving = asyncio.create_task(serve())
        await until(lambda: len(processes.started) == 3)
        for one in processes.started[:2]:
            one.link.ready.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(one.sent for one in processes.started)
        processes.started[2].link.ready.set()
        await serving
        assert [kinds(one) for one in processes.started] == [[MaxModelLen, Serve, Stop, Stop]] * 3

    run(check)


def test_a_worker_that_ends_is_replaced(processes: Processes, caplog: pytest.LogCaptureFixture) -> None:
    async def check(workers: Workers) -> None:
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            processes.refusals = 2  # not even that ends the router
            processes.started[1].kill()
            await all_ready(processes, 4)
            await until(lambda: Serve() in processes.started[3].sent)
            assert processes.started[3].start.index == processes.started[1].start.index
            assert len(workers.status()) == 3

    run(check)
    assert "exited with -9, 0 requests aborted" in caplog.text
    assert "cannot be started: no memory" in caplog.text


def test_a_worker_that_cannot_start_ends_the_router(processes: Processes) -> None:
    async def check(workers: Workers) -> None:
        processes.refusals = 1
        with pytest.raises(WorkersFailedError, match="router-0 cannot be started: no memory"):
            async with workers.serving():
                pass
        assert all(one.end.done() for one in processes.started)

    run(check)


def test_workers_that_finish_are_told_again_when_the_router_ends_and_connections_are_refused(
    processes: Processes,
) -> None:
    async def check(workers: Workers) -> None:
        workers._listener.bind(("127.0.0.1", 0))
        workers._listener.listen()
        address = workers._listener.getsockname()
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            processes.started[0].obeys = False
            finishing = asyncio.create_task(workers.finish())
            await asyncio.gather(*(one.end for one in processes.started[1:]))
            await until_refused(*address)
            assert kinds(processes.started[0]).count(Stop) == 1
            processes.started[0].obeys = True
        await finishing
        assert kinds(processes.started[0]).count(Stop) == 2
        assert [one.end.result() for one in processes.started] == [0, 0, 0]

    run(check)


def test_a_worker_that_does_not_end_is_killed(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_KILL_AFTER_S", 0.0)

    async def check(workers: Workers) -> None:
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            processes.started[2].obeys = False
        assert [one.end.result() for one in processes.started] == [0, 0, -9]

    run(check)


def test_metrics_do_not_wait_for_a_worker_that_hangs(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "REPORT_TIMEOUT_S", 0.01)

    async def check(workers: Workers) -> None:
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            processes.started[0].hangs = True
            await workers.collect()

    run(check)


def test_a_worker_that_does_not_answer_is_killed_and_replaced(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "PROBE_INTERVAL_S", 0.0)
    monkeypatch.setattr(pool, "MAX_UNANSWERED", 3)
    monkeypatch.setattr(pool, "MAX_UNANSWERED_AT_START", 1 << 30)

    async def check(workers: Workers) -> None:
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            processes.started[1].hangs = True
            await until(lambda: len(processes.started) == 4)
            assert processes.started[1].end.result() == -9
            processes.started[3].hangs = True  # but it is starting yet
            before = len(processes.started[0].sent)
            await until(lambda: len(processes.started[0].sent) > before + 2 * pool.MAX_UNANSWERED)
            assert [one.end.done() for one in processes.started] == [False, True, False, False]

    run(check)
    assert "router worker does not answer" in caplog.text


def test_a_worker_that_never_gets_ready_is_killed_and_replaced(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, only workers that had been ready were asked, and one worker less served."""
    monkeypatch.setattr(pool, "PROBE_INTERVAL_S", 0.0)
    monkeypatch.setattr(pool, "MAX_UNANSWERED_AT_START", 1 << 30)

    async def check(workers: Workers) -> None:
        starting = asyncio.create_task(all_ready(processes, 3))
        async with workers.serving():
            await starting
            monkeypatch.setattr(pool, "MAX_UNANSWERED_AT_START", 3)
            processes.started[1].kill()
            await until(lambda: len(processes.started) >= 5)  # the fourth is never ready
            assert processes.started[3].end.result() == -9
            assert not any(isinstance(message, ReportWanted) for message in processes.started[3].sent)
            assert [one.end.done() for one in processes.started[:3]] == [False, True, False]

    run(check)
    assert "router worker does not start" in caplog.text


def test_a_worker_that_never_gets_ready_ends_a_router_that_starts(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PROBE_INTERVAL_S", 0.0)
    monkeypatch.setattr(pool, "MAX_UNANSWERED_AT_START", 3)

    async def check(workers: Workers) -> None:
        with pytest.raises(WorkersFailedError, match="exited with -9"):
            async with workers.serving():
                pass

    run(check)


def test_a_worker_that_does_not_read_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_UNSENT_BYTES", 1 << 20)

    class NoLink:
        def receive(self, _: FromWorker) -> None:
            raise AssertionError("it says nothing")

    class Hanging:
        returncode: int | None = None

        def kill(self) -> None:
            self.returncode = -9

    async def check() -> None:
        here, there = socket.socketpair()
        hanging = Hanging()
        worker = Worker(cast(Any, hanging), lambda send: cast(Any, NoLink()))
        channel = worker._channel
        await channel.open(here)
        with there:
            for ask_id in range(100):
                worker.send(Answered(ask_id, 200, [], bytes(64 << 10)))
                await asyncio.sleep(0)
            assert hanging.returncode == -9
        channel.abort()
        await channel.lost.wait()

    asyncio.run(check())


def test_a_worker_has_its_share_and_no_secrets() -> None:
    settings = config("mixed", workers=4, max_total_body_bytes=400 << 20, preparation_workers=6)
    its = ClusterConfig.model_validate_json(worker_config(settings).model_dump_json(include=pool.SECTIONS))
    assert its.router.workers == 1
    assert its.router.max_total_body_bytes == 100 << 20
    assert its.router.preparation_workers == 1
    assert its.router.key_max_requests == settings.router.key_max_requests
    assert its.nodes == ()
    assert its.registry.url is None
