"""Operators ask for recordings: the router's own, and those of a node and its messager."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from driver import Driver
from fake_nodes import clients_app, config, register
from starlette.types import ASGIApp

import router.node_dumps
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Received, Send
from kvrelay.protocol.ids import NodeId, peer_id
from kvrelay.protocol.messages.node_to_router import Dumped
from kvrelay.protocol.messages.router_to_node import Dump
from router.events import DumpReported, DumpRequested
from router.http.operators import make_operators_app
from router.machine import RouterMachine, RouterSettings
from router.model import load_model
from router.service import RouterService

PROCESSES = {"m0": ["m0"], "d0": ["d0", "d0.messager"], "p0": ["p0", "p0.messager"]}


class Service(RouterService):
    """With three nodes, whose processes report as soon as they are asked, but for those in ``silent``."""

    def __init__(self, *silent: str) -> None:
        settings = config("mixed")
        super().__init__(settings, load_model(settings), Clock())
        self.machine = RouterMachine(RouterSettings("demo", "r1"))
        self.silent = silent
        for name, role in (("m0", "mixed"), ("d0", "decode"), ("p0", "prefill"), ("old", "mixed")):
            message = msgspec.structs.replace(register(name, role, "a1"), can_dump=name != "old")
            self.machine.handle(Received(peer_id(name, "a1"), message), 0.0)
        self.posted: list[DumpRequested] = []

    def _post(self, event: Any) -> None:
        self.posted.append(event)
        for process in PROCESSES[event.node_id]:
            if process not in self.silent:
                self.node_dumps.take(DumpReported(event.dump_id, process, f"/{process}.kvrec", ""))
        self.node_dumps.take(DumpReported("of somebody who has left", "x", "/x", ""))


def post(app: ASGIApp, path: str) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(path)

    return asyncio.run(scenario())


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prompts", [False, True])
def test_a_nodes_processes_are_asked_and_their_files_are_the_answer(name: str, prompts: bool) -> None:
    service = Service()
    response = post(make_operators_app(service), f"/cluster/nodes/{name}/dump{'?prompts=true' if prompts else ''}")
    assert response.status_code == 200
    files = [{"process": process, "path": f"/{process}.kvrec", "error": ""} for process in PROCESSES[name]]
    assert response.json() == {"files": files}
    assert [(event.node_id, event.with_prompts) for event in service.posted] == [(name, prompts)]


def test_who_does_not_answer_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.node_dumps, "TIMEOUT_S", 0.05)
    response = post(make_operators_app(Service("d0.messager")), "/cluster/nodes/d0/dump")
    assert [file["process"] for file in response.json()["files"]] == ["d0"]
    response = post(make_operators_app(Service("m0")), "/cluster/nodes/m0/dump")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_unknown_and_earlier_nodes_are_not_asked() -> None:
    service = Service()
    response = post(make_operators_app(service), "/cluster/nodes/other/dump")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    response = post(make_operators_app(service), "/cluster/nodes/old/dump")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_supported")
    assert service.posted == []


def test_the_routers_own_recording() -> None:
    response = post(make_operators_app(Service()), "/cluster/dump")
    (file,) = response.json()["files"]
    assert (file["process"], file["error"]) == ("router", "")
    assert Path(file["path"]).is_file()


def test_clients_have_no_such_endpoint() -> None:
    service = Service()
    app = clients_app(service)
    assert {post(app, path).status_code for path in ("/cluster/dump", "/cluster/nodes/m0/dump")} == {404}


def test_the_machine_asks_the_node_and_passes_its_report_on() -> None:
    machine = Driver().machine
    node = peer_id("m0", "a1")
    for can_dump in (False, True):
        machine.handle(Received(node, msgspec.structs.replace(register("m0", "mixed", "a1"), can_dump=can_dump)), 1.0)
        asked = machine.handle(DumpRequested(NodeId("m0"), "0a1b", True), 1.0)
        assert asked == ([Send(node, Dump(dump_id="0a1b", with_prompts=True))] if can_dump else [])
    assert machine.handle(DumpRequested(NodeId("other"), "0a1b", True), 1.0) == []
    report = Dumped(dump_id="0a1b", process="m0", path="/m0.kvrec", error="")
    assert machine.handle(Received(node, report), 1.0) == [DumpReported("0a1b", "m0", "/m0.kvrec", "")]
