"""Runs the router's machine on sockets and passes deliveries to the HTTP handlers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError, InvalidRequestError, NoNodeError
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import StopRequested
from kvrelay.protocol.ids import ROUTER, NodeId, RequestId, new_incarnation, peer_id
from kvrelay.recording.settings import RecordingSettings
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.faults import open_transport
from kvrelay.runtime.keys import configured_keys
from kvrelay.runtime.message_faults import MessageFaults
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.transport import Transport
from router.body_memory import BodyMemory
from router.events import (
    PARTS,
    CacheResetEnded,
    CacheResetRequested,
    CancelRequested,
    ClientGone,
    ClientsFinished,
    Deliver,
    DrainRequested,
    DumpReported,
    FinishClients,
    NewRequest,
    NodeReset,
    RequestErrored,
    StopMatched,
    Submitted,
)
from router.expected_nodes import expected_nodes
from router.follower import following
from router.frontend import STOPPING, Sink
from router.limits import Limits
from router.machine import RouterMachine, RouterSettings
from router.model import ServedModel
from router.node_dumps import NodeDumps
from router.preparation_pool import Preparer
from router.recording import ROUTER_EVENTS

_EPOCH_SHARES, _EPOCHS_PER_SHARE = 31, 24
"""Bits of an epoch: each router start draws its high bits at random and counts up in the low bits."""


def router_settings(config: ClusterConfig, incarnation: str) -> RouterSettings:
    """Return the machine's settings from ``config``."""
    router, cluster = config.router, config.cluster
    return RouterSettings(
        model=config.model.name,
        incarnation=incarnation,
        first_epoch=secrets.randbits(_EPOCH_SHARES) << _EPOCHS_PER_SHARE,
        prefill_routing=router.prefill_routing,
        decode_routing=router.decode_routing,
        local_prefill_tokens=router.local_prefill_tokens,
        heartbeat_s=cluster.heartbeat_s,
        peer_timeout_s=cluster.peer_timeout_s,
        drain_timeout_s=cluster.drain_timeout_s,
        limits=Limits(
            max_queued_requests=router.max_queued_requests,
            max_attempts=router.max_attempts,
            request_timeout_s=router.request_timeout_s,
            node_wait_s=router.node_wait_s,
            peer_timeout_s=cluster.peer_timeout_s,
            ttft_slo_s=router.ttft_slo_s,
        ),
        expected_nodes=expected_nodes(config),
        self_check=cluster.self_check,
    )


class Clients(Protocol):
    """What serves clients: an HTTP server, or the worker processes that have one each."""

    async def finish(self) -> None:
        """Accept no more connections; return when those that there are have ended."""


class RouterService:
    """The machine, its shell, and the sink of each request. All methods are called from the loop's thread."""

    def __init__(self, config: ClusterConfig, model: ServedModel, clock: Clock) -> None:
        self.config = config
        self.model = model
        self.clock = clock
        self.started_s = clock.now()
        self.preparer = Preparer(config, model)
        self.body_memory = BodyMemory(config.router.max_total_body_bytes, clock.now)
        self._incarnation = new_incarnation()
        settings = router_settings(config, self._incarnation)
        self.machine = RouterMachine(settings)
        self.dumps = Dumps(ROUTER, ROUTER, settings, ROUTER_EVENTS, RecordingSettings.of(config))
        self.node_dumps = NodeDumps(self._post)
        self._sinks: dict[RequestId, Sink] = {}
        self._resets: dict[int, asyncio.Future[tuple[NodeReset, ...]]] = {}
        self._shell: Shell | None = None
        self._finishing: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        """Set when the machine takes no requests any more."""
        self.control_addresses: list[str] = []
        self.http_workers: Callable[[], list[dict[str, object]]] = list
        """Returns the worker processes that serve clients, for operators."""

    async def run(self, clients: Clients) -> str:
        """Serve ``clients`` until stopped and drained; return the reason.

        Raises ConfigError if it cannot listen for nodes, its keys cannot be read, or the registry's URL is invalid.
        """
        shell = self._shell = Shell(
            self.machine,
            clock=self.clock,
            dumps=self.dumps,
            handlers={
                Deliver: self._deliver,
                FinishClients: lambda _: self._finish(clients),
                CacheResetEnded: self._reset_ended,
                DumpReported: self.node_dumps.take,
            },
        )
        keys = configured_keys(self.config.security, ROUTER)
        faults = MessageFaults.of(self.config.faults)
        transport = open_transport(peer_id(ROUTER, self._incarnation), shell.post, faults, keys=keys)
        try:
            if self.config.registry.kind == "static":
                self.control_addresses = self._bind(transport)
                return await shell.run(transport)
            async with following(self.config.registry, shell.post, self.config.cluster.heartbeat_s):
                return await shell.run(transport)
        finally:
            self.ended.set()
            if self._finishing is not None:
                self._finishing.cancel()
            self._end_all()
            transport.close()
            await self.preparer.close()

    def _finish(self, clients: Clients) -> None:
        async def finish() -> None:
            await clients.finish()
            self._post(ClientsFinished())

        self._finishing = asyncio.create_task(finish())

    def _end_all(self) -> None:
        """End what was submitted too late for the machine to take it."""
        left, self._sinks = self._sinks, {}
        for request_id, sink in left.items():
            sink(request_id, RequestErrored.of(NoNodeError(STOPPING)))
        for answered in self._resets.values():
            if not answered.done():
                answered.set_exception(NoNodeError(STOPPING))

    def _bind(self, transport: Transport) -> list[str]:
        address = self.config.router.control
        try:
            return transport.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError([f"router.control: cannot listen at {address}: {error.strerror}"]) from error

    # ------------------------------------------------------------ for the HTTP side

    @property
    def max_model_len(self) -> int:
        """The longest sequence this cluster serves, in tokens."""
        return min(self.model.max_model_len, self.machine.node_table.max_model_len or self.model.max_model_len)

    def submit(self, requests: Sequence[NewRequest], deliver: Sink) -> None:
        """Submit ``requests``; ``deliver(request_id, delivery)`` is called for each delivery until all have ended.

        Raises InvalidRequestError if one of the ids is in use, NoNodeError if this router has ended.
        """
        if self.ended.is_set():
            raise NoNodeError(STOPPING)
        for request in requests:
            if request.request_id in self._sinks:
                raise InvalidRequestError(
                    f"a request with the id {request.request_id} is in progress", param="X-Request-Id"
                )
        for request in requests:
            self._sinks[request.request_id] = deliver
        self._post(Submitted(tuple(requests)))

    async def any_in_progress(self, request_ids: Sequence[RequestId]) -> bool:
        """Return whether a request with one of these ids has been submitted and has not ended."""
        return self.has_any(request_ids)

    def has_any(self, request_ids: Sequence[RequestId]) -> bool:
        """See ``any_in_progress``."""
        return any(request_id in self._sinks for request_id in request_ids)

    def stop_matched(self, request_id: RequestId) -> None:
        """Report that the text contains a stop string, so that no more tokens are needed."""
        self._post(StopMatched(request_id))

    def client_disconnected(self, request_id: RequestId) -> None:
        """Report that the client has disconnected."""
        self._post(ClientGone(request_id))

    def cancel(self, request_id: RequestId) -> None:
        """Cancel a request for an operator: its client gets an error."""
        self._post(CancelRequested(request_id))

    async def reset_prefix_caches(self) -> tuple[NodeReset, ...]:
        """Have every node forget its prefix cache; return what became of it on each, at the latest after its timeout.

        Raises NoNodeError if this router ends before.
        """
        if self.ended.is_set():
            raise NoNodeError(STOPPING)
        reset = secrets.randbits(63)
        answered: asyncio.Future[tuple[NodeReset, ...]] = asyncio.get_running_loop().create_future()
        self._resets[reset] = answered
        self._post(CacheResetRequested(reset))
        return await answered

    def drain(self, node_id: str, *, stay_down: bool) -> None:
        """Drain this node: send it nothing new and let it finish its requests and leave, for good if ``stay_down``."""
        self._post(DrainRequested(NodeId(node_id), stay_down))

    def stop(self) -> None:
        """Accept no more connections, finish what clients have asked and ask on those there are, then exit."""
        self._post(StopRequested())

    def _post(self, event: object) -> None:
        if self._shell is None:
            raise RuntimeError("the router's shell is not running")
        self._shell.post(event)

    def _deliver(self, action: Deliver) -> None:
        if isinstance(action.delivery, PARTS):
            sink = self._sinks[action.request_id]
        else:
            sink = self._sinks.pop(action.request_id)
        sink(action.request_id, action.delivery)

    def _reset_ended(self, action: CacheResetEnded) -> None:
        answered = self._resets.pop(action.reset)
        if not answered.done():  # done: the operator has left
            answered.set_result(action.nodes)
