"""Runs one node: loads the engine, starts the messager, runs the machine until it exits."""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import uvloop
import zmq

from cache_messager.launch import launched
from cache_messager.settings import MessagerSettings
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.compute_thread import compute_for
from kvrelay.engine.interface import Engine, EnginePort
from kvrelay.engine.load import load_engine
from kvrelay.errors import ConfigError, StorageError, StorageUnavailableError
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Announce, PeerLost, PublishKVEvents, RunStep
from kvrelay.machine.membership import REFUSED
from kvrelay.node.kv_event_publisher import KVEventPublisher
from kvrelay.node.machine import DRAINED, STOPPED, NodeMachine
from kvrelay.node.metrics_server import MetricsServer
from kvrelay.node.node_metrics import NodeMetrics
from kvrelay.node.recording import NODE_EVENTS, NodeStart
from kvrelay.node.storage import StorageIO, injected_delay
from kvrelay.protocol.ids import MESSAGER, ROUTER, NodeId, PeerId, new_incarnation, peer_id
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.recording.settings import RecordingSettings
from kvrelay.registry.publisher import announcing
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.faults import open_transport
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.runtime.keys import Keys, configured_keys
from kvrelay.runtime.listening import listen_problem
from kvrelay.runtime.logging import log_event, progress_log
from kvrelay.runtime.message_faults import MessageFaults
from kvrelay.runtime.runtime_dir import new_socket_file, runtime_dir
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.startup import startup
from kvrelay.runtime.transport import Transport
from kvstore.offload.kv_offloader import num_staging_slots
from kvstore.storage.factory import make_store

MakeMachine: TypeAlias = Callable[[Register, int], NodeMachine[Any, Any]]
"""Builds a role's machine from its registration and the engine's maximum plans in flight."""


def run_node(node: NodeConfig, make_machine: MakeMachine, *, layer_events: bool) -> int:
    """Serve as ``node`` until stopped; return the exit status.

    0: drained, 1: failed, 2: registration refused, 3: drained and not to be started again.

    ``layer_events``: report each computed layer to the machine. Raises ConfigError or CheckpointError if this node can
    never run as configured.
    """
    _require_free_port(node)
    engine = load_engine(node, progress_log(f"{node.name} checkpoint"))
    try:
        reason = uvloop.run(_serve(node, engine, make_machine, layer_events))
    finally:
        engine.close()
    log_event("info", "stopped", {"reason": reason})
    return {DRAINED: 0, REFUSED: 2, STOPPED: 3}.get(reason, 1)


async def _serve(node: NodeConfig, engine: Engine, make_machine: MakeMachine, layer_events: bool) -> str:
    incarnation = new_incarnation()
    me = peer_id(node.name, incarnation)
    registration = _registration(node, incarnation, engine)
    clock = Clock()
    machine = make_machine(registration, engine.max_plans_in_flight)
    start = NodeStart.of(node, registration, engine.max_plans_in_flight)
    dumps = Dumps(node.name, node.role, start, NODE_EVENTS, RecordingSettings.of(node))
    shell = Shell(machine, clock=clock, dumps=dumps)
    shell.listen_for_stop()
    startup.report("connecting")
    compute: EnginePort = compute_for(engine, shell.post_threadsafe, layer_events=layer_events)
    shell.handle_with(RunStep, lambda action: compute.submit(action.plan))
    keys = configured_keys(node.security, node.name)
    transport = open_transport(me, shell.post, MessageFaults.of(node.faults), keys=keys)
    compute.start()
    tune_gc()
    try:
        with runtime_dir() as directory:
            _bind(transport, node)
            async with (
                _metrics(node, registration, machine, clock),
                _storage(node, engine, shell, keys),
                _registry(node, registration, shell, transport),
            ):
                with _kv_events(node, shell):
                    if node.role == "mixed":
                        return await shell.run(transport)
                    return await _run_with_messager(node, engine, me, directory, shell, transport)
    finally:
        compute.stop()
        transport.close()


def _require_free_port(node: NodeConfig) -> None:
    """Raise ConfigError if a port of the node is in use. Checked before loading the checkpoint: it may take minutes."""
    for key, address in (("port", (node.host, node.port)), ("metrics_port", node.metrics_address)):
        problem = listen_problem(*address) if address is not None else None
        if problem is not None:
            raise ConfigError([f"nodes.{node.name}.{key}: {problem}"])


def _bind(transport: Transport, node: NodeConfig) -> None:
    """Listen for routers and peers. Raises ConfigError if the port is in use by now."""
    try:
        transport.bind(node.address)
    except zmq.ZMQError as error:
        raise ConfigError([f"nodes.{node.name}.port: cannot listen at {node.address}: {error.strerror}"]) from error


@asynccontextmanager
async def _metrics(
    node: NodeConfig, registration: Register, machine: NodeMachine[Any, Any], clock: Clock
) -> AsyncIterator[None]:
    """Serve ``/metrics`` for the context, if the node has a port for it. Raises ConfigError if the port is in use."""
    if node.metrics_address is None:
        yield
        return
    server = MetricsServer(NodeMetrics(registration, machine.load, clock.now).exposition, clock.now)
    async with server.listening(f"nodes.{node.name}.metrics_port", *node.metrics_address):
        yield


@contextmanager
def _kv_events(node: NodeConfig, shell: Shell) -> Iterator[None]:
    """Publish KV events for the context, if they are wanted. Raises ConfigError if an address is in use."""
    if node.kv_events.endpoint is None:
        yield
        return
    key = f"nodes.{node.name}.kv_events"
    with KVEventPublisher(key, node.kv_events, f"kv@{node.name}@{node.model.name}") as publisher:
        shell.handle_with(PublishKVEvents, publisher.publish)
        yield


@asynccontextmanager
async def _storage(node: NodeConfig, engine: Engine, shell: Shell, keys: Keys | None) -> AsyncIterator[None]:
    """Open the node's store for the context, if one is configured. Without one the machine emits no storage actions.

    Raises ConfigError if the store cannot work as configured, StorageUnavailableError if it cannot be opened now.
    """
    if node.storage.backend == "none":
        yield
        return
    clock = Clock()
    store = make_store(node.storage, engine.geometry, clock, node.host, keys, injected_delay(node.faults))
    num_slots = num_staging_slots(node.storage, engine.geometry.block_bytes)
    async with AsyncExitStack() as stack:
        try:
            storage = await stack.enter_async_context(StorageIO(store, engine.memory, num_slots, shell.post, clock))
        except StorageUnavailableError:
            raise
        except StorageError as error:
            raise ConfigError([f"nodes.{node.name}: {error}"]) from error
        storage.handle_with(shell)
        yield


@asynccontextmanager
async def _registry(
    node: NodeConfig, registration: Register, shell: Shell, transport: Transport
) -> AsyncIterator[None]:
    """Connect to the configured router, or announce this node in the registry."""
    if node.registry.kind == "static":
        transport.connect(ROUTER, node.router.control)
        yield
        return
    async with announcing(node.registry, registration) as announce:
        shell.handle_with(Announce, announce)
        yield


async def _run_with_messager(
    node: NodeConfig, engine: Engine, me: PeerId, directory: Path, shell: Shell, transport: Transport
) -> str:
    settings = MessagerSettings.for_node(
        node,
        node=me,
        node_address=f"ipc://{new_socket_file(directory, node.name)}",
        geometry=engine.geometry,
        pool=engine.memory.handle,
        runtime_dir=str(directory),
    )
    transport.bind_private(MESSAGER, settings.node_address)
    async with launched(settings) as messager:
        watch = asyncio.create_task(_watch(messager, shell))
        try:
            return await shell.run(transport)
        finally:
            watch.cancel()


def _registration(node: NodeConfig, incarnation: str, engine: Engine) -> Register:
    max_model_len = min(engine.max_model_len, node.model.max_model_len or engine.max_model_len)
    return Register(
        node_id=NodeId(node.name),
        incarnation=incarnation,
        role=node.role,
        address=node.address,
        pid=os.getpid(),
        model=node.model.name,
        max_model_len=max_model_len,
        max_num_seqs=node.scheduler.max_num_seqs,
        num_blocks=engine.memory.num_blocks,
        geometry=engine.geometry,
        vocab_size=engine.vocab_size,
        prefill_order=node.scheduler.prefill_order,
        can_dump=True,
        resets_prefix_cache=True,
    )


async def _watch(messager: Process, shell: Shell) -> None:
    """Post PeerLost to the machine when the messager's process exits."""
    status = await messager.wait()
    shell.post(PeerLost(MESSAGER, f"it exited with status {status}"))
