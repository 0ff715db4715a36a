"""A cluster in one loop: the real router on real sockets, and nodes that answer with tokens from a formula."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import httpx
from starlette.types import ASGIApp

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Received
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import PeerId, RequestId, peer_id
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, LayerTransfer, Load, Mark, Message
from kvrelay.protocol.messages.node_to_router import Register, RequestFailed, RequestOutput, RequestTimeline, TokensOut
from kvrelay.protocol.messages.router_to_node import Abort, Generate, Prefill
from kvrelay.protocol.request import FinishReason, RequestSpec, TokenLogprobs
from kvrelay.runtime.transport import Transport
from router.http.api_keys import ApiKeys
from router.http.app import make_app
from router.http.protocol import HttpProtocol
from router.http.server import HttpServer, http_limits, http_server, tls_files
from router.http.state import state_routes
from router.metrics import Metrics
from router.model import ServedModel, load_model
from router.openai.generation import Generation
from router.service import RouterService

GEOMETRY = KVGeometry(
    num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", model_digest="fake-1024"
)
ANSWER = "The fox says: 🦊! Twice: 🦊. END of it, and then some more words follow."


def register(node_id: str, role: str = "mixed", incarnation: str = "a", **fields: object) -> Register:
    known: dict[str, object] = {
        "address": f"tcp://{node_id}:1",
        "pid": 1,
        "model": "demo",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "num_blocks": 64,
        "geometry": GEOMETRY,
    }
    return Register(node_id=node_id, incarnation=incarnation, role=role, **{**known, **fields})  # type: ignore[arg-type]


@dataclass
class Script:
    """What fake nodes answer: the bytes of ``answer`` over and over, ``pace_s`` apart, or an error (of one node).

    What two nodes say may overtake each other on the way: an error is said when ``fail_when`` holds. ``in_step``: no
    token is said before the router has made a chunk of the one before.
    """

    answer: str = ANSWER
    pace_s: float = 0.0
    in_step: bool = False
    fail_with: ErrorInfo | None = None
    fail_times: int = 0
    fail_at: str = ""
    fail_when: Callable[[], object] = lambda: True
    aborted: list[str] = field(default_factory=list)
    specs: list[RequestSpec] = field(default_factory=list)


class FakeNode:
    """One node: registers, takes Prefill or Generate, sends one TokensOut per token, honours Abort."""

    def __init__(self, node_id: str, role: str, script: Script, encode: Callable[[str], list[int]]) -> None:
        self.node_id = node_id
        self._script = script
        self._tokens = encode(script.answer)
        self._registration = register(node_id, role)
        # A node sends a message per step, not per token as this one does: its queue is never that long.
        self._transport = Transport(peer_id(node_id, "a"), self._take, send_queue=1 << 20)
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.partners: dict[str, FakeNode] = {}
        self.num_taken: Callable[[str], float] = lambda request_id: math.inf

    def join(self, address: str) -> None:
        self._load = Load()
        self._transport.connect(PeerId("router"), address)
        self._transport.send(PeerId("router"), self._registration)

    def beat(self, **load: Any) -> None:
        """Send a heartbeat with ``load``, or with that of the last one."""
        if load:
            self._load = Load(**load)
        self._transport.send(PeerId("router"), Heartbeat(load=self._load))

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._transport.close()

    def say(self, message: Message) -> None:
        self._transport.send(PeerId("router"), message)

    def _take(self, event: object) -> None:
        if not isinstance(event, Received):
            return
        match event.message:
            case Generate(request=spec):
                self._start(spec, 0, None)
            case Prefill(request=spec, decode_node=decode_node):
                partner = self.partners[decode_node.peer] if decode_node else None
                self._start(spec, 0, partner)
            case Abort(request_id=request_id, epoch=epoch):
                self._script.aborted.append(f"{self.node_id}:{request_id}")
                task = self._tasks.pop((request_id, epoch), None)
                if task is not None:
                    task.cancel()

    def _start(self, spec: RequestSpec, done: int, partner: FakeNode | None) -> None:
        self._script.specs.append(spec)
        key = (spec.request_id, spec.epoch)
        self._tasks[key] = asyncio.get_running_loop().create_task(self._serve(spec, done, partner))

    async def _serve(self, spec: RequestSpec, done: int, partner: FakeNode | None) -> None:
        script = self._script
        if script.fail_with is not None and script.fail_times != 0 and script.fail_at in ("", self.node_id):
            script.fail_times -= 1
            error = script.fail_with
            await until(script.fail_when)
            self.say(RequestFailed(request_id=spec.request_id, epoch=spec.epoch, error=error))
            return
        done = max(done, len(spec.output_token_ids))
        while done < spec.sampling.max_tokens:
            if self._script.pace_s:
                await asyncio.sleep(self._script.pace_s)
            if self._script.in_step:
                await self._taken(spec, done)
            output = self._output(spec, done)
            self.say(TokensOut(outputs=[output]))
            done += 1
            if output.finish_reason is not None:
                break
            if partner is not None:
                partner._start(spec, done, None)
                break
        self._tasks.pop((spec.request_id, spec.epoch), None)
        marks = [Mark("prefill", spec.arrival_s, self.node_id)]
        layers = [LayerTransfer(0, spec.arrival_s, spec.arrival_s, 1024)] if partner else []
        self.say(RequestTimeline(request_id=spec.request_id, epoch=spec.epoch, marks=marks, layers=layers))

    async def _taken(self, spec: RequestSpec, num_tokens: int) -> None:
        await until(lambda: self.num_taken(spec.request_id) >= num_tokens)

    def _output(self, spec: RequestSpec, index: int) -> RequestOutput:
        token_id = self._tokens[(index + spec.sampling.seed % 2) % len(self._tokens)]
        last, stop_token_id = index + 1 == spec.sampling.max_tokens, None
        finish_reason = FinishReason.LENGTH if last else None
        if token_id in spec.sampling.stop_token_ids and index >= spec.sampling.min_tokens:
            finish_reason, stop_token_id = FinishReason.STOP, token_id
        logprobs = []
        if spec.sampling.num_logprobs is not None:
            top = list(range(spec.sampling.num_logprobs))
            logprobs = [TokenLogprobs(-0.5, top, [-1.0 - rank for rank in top])]
        return RequestOutput(
            request_id=spec.request_id,
            epoch=spec.epoch,
            index=index,
            token_ids=[token_id],
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=4,
        )


def _num_taken(service: RouterService, request_id: str) -> float:
    """Return how many tokens of a request its stream has taken; infinity when it has ended."""
    sink = service._sinks.get(RequestId(request_id))
    if sink is None:
        return math.inf
    generation = cast(Generation, sink.__self__)  # type: ignore[attr-defined]  # a bound method
    return generation._choices[RequestId(request_id)].num_tokens


async def _beat(nodes: Sequence[FakeNode]) -> None:
    """Keep ``nodes`` alive, however long the test takes; of their loads they say nothing."""
    while True:
        for node in nodes:
            node.beat()
        await asyncio.sleep(1.0)


async def until(condition: Callable[[], object]) -> None:
    """Return when ``condition`` holds, which other tasks of this loop bring about."""
    while not condition():  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.001)


async def until_refused(host: str, port: int) -> None:
    """Return when connections are refused there: a socket is closed some turns of the loop after it was told to be."""
    with suppress(ConnectionRefusedError):
        while True:
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            await asyncio.sleep(0.001)


def clients_app(service: RouterService, keys: ApiKeys | None = None) -> ASGIApp:
    """Return the clients' application of a router without workers."""
    metrics = Metrics(service.machine, service.clock.now)
    return make_app(service, metrics, state_routes(service, metrics), keys)


@dataclass
class FakeCluster:
    service: RouterService
    model: ServedModel
    nodes: list[FakeNode]
    client: httpx.AsyncClient
    url: str
    script: Script
    http: HttpServer

    async def quiet(self) -> None:
        """Return when neither the machine nor a body holds anything any more."""
        await until(lambda: not self.service.machine.requests)
        self.service.machine.assert_quiescent()
        await until(lambda: not self.service.body_memory.num_bytes)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def connections(self) -> list[HttpProtocol]:
        """Those of clients, as the router has them."""
        return [cast(HttpProtocol, connection) for connection in self.http.server_state.connections]


def config(roles: str = "", /, **router: object) -> ClusterConfig:
    """Return a config with a node ``n0``, ``n1``, ... for each of ``roles``, and nodes that are never there."""
    names = {f"n{number}": role for number, role in enumerate(roles.split())}
    names |= {"p": "prefill", "d": "decode", "m": "mixed"}
    return ClusterConfig.from_data(
        {
            "model": {"path": "nowhere", "served_name": "demo", "max_model_len": 512},
            "router": {"control": "tcp://127.0.0.1:0", "preparation_timeout_s": 3600.0, **router},
            "engine": {"kind": "fake", "fake": {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8}},
            "cluster": {"drain_timeout_s": 3600.0},
            "security": {"insecure": True},
            "nodes": [{"name": name, "role": role, "host": name, "port": 1} for name, role in names.items()],
        }
    )


@asynccontextmanager
async def fake_cluster(
    script: Script | None = None, roles: str = "prefill decode", **router: object
) -> AsyncIterator[FakeCluster]:
    script = script or Script()
    settings, clock = config(roles, **router), Clock()
    model = load_model(settings)
    service = RouterService(settings, model, clock)
    app = clients_app(service, ApiKeys.of(settings.router, clock.now, env={}))
    tls = tls_files(settings.router)
    server = http_server(app, "127.0.0.1", 0, http_limits(settings.router), tls)
    running = asyncio.create_task(service.run(server))
    await until(lambda: service.control_addresses)
    nodes = [FakeNode(f"n{i}", role, script, model.tokenizer.encode) for i, role in enumerate(roles.split())]
    for node in nodes:
        node.partners = {peer_id(other.node_id, "a"): other for other in nodes}
        node.num_taken = partial(_num_taken, service)
        node.join(service.control_addresses[0])
    beating = asyncio.create_task(_beat(nodes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        http = asyncio.create_task(server.serve([listener]))
        await until(lambda: len(list(service.machine.node_table)) == len(nodes))
        try:
            verify = ssl.create_default_context(cafile=tls[0]) if tls else False
            async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, verify=verify) as client:
                yield FakeCluster(service, model, nodes, client, url, script, server)
        finally:
            service.stop()
            service.stop()
            await running
            beating.cancel()
            server.should_exit = True
            await http
            for node in nodes:
                node.close()
