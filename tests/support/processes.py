"""What a process is in the World: a machine, its connections and timers, and what performs its actions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from cache_messager.machine import MessagerMachine
from cache_messager.mover import BlockMover
from cache_messager.recording import MESSAGER_EVENTS, MessagerStart
from cache_messager.settings import MessagerSettings
from cache_messager.work import DropLink, Work, WriteBlocks
from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.fake import FakeEngine, step_seconds
from kvrelay.kv_pool.attach import open_pool
from kvrelay.machine.contract import (
    CancelTimer,
    Connect,
    Disconnect,
    DumpWritten,
    EngineLost,
    Exit,
    LayersComputed,
    Log,
    Machine,
    PeerLost,
    PublishKVEvents,
    Ready,
    Received,
    Resumed,
    RunStep,
    Send,
    SetTimer,
    Started,
    StepDone,
    StepFailed,
    TimerFired,
    WriteDump,
)
from kvrelay.node.recording import NODE_EVENTS, NodeStart
from kvrelay.protocol.codec import encode
from kvrelay.protocol.ids import MESSAGER, ROUTER, NodeId, PeerId, peer_id, peer_name
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.engine import StepPlan, StepResult
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.recording.event_codec import EventCodec
from kvrelay.recording.recorder import Handle, Recorder
from kvrelay.recording.settings import RecordingSettings
from prefill_node.machine import PrefillMachine
from router.events import CacheResetEnded, Deliver, DumpReported
from router.machine import RouterMachine, RouterSettings
from router.recording import ROUTER_EVENTS
from support.fake_store import FakeStorageIO

if TYPE_CHECKING:
    from support.world import World

CONTROL = "tcp://router:8100"
MAX_WRITE_S = 0.0002
"""How long a messager takes at most to write a frame's blocks; half as long at least."""


class Process:
    """Does for one machine in virtual time what Shell and Transport do on sockets.

    ``addresses`` is where it listens, ``connections`` whom it reached out to and what it calls them, ``aliases`` what
    it calls some of those that reached out to it.
    """

    def __init__(self, world: World, peer: PeerId, machine: Machine, addresses: Sequence[str]) -> None:
        self.world = world
        self.peer = peer
        self.machine = machine
        self.addresses = list(addresses)
        self.connections: dict[PeerId, str] = {}
        self.aliases: dict[PeerId, PeerId] = {}
        self.alive = True
        self.paused = False
        self._paused_since_s = 0.0
        self.exit_reason: str | None = None
        self.log: list[Log] = []
        self.kv_events: list[PublishKVEvents] = []
        self._backlog: list[object] = []
        self._timers: dict[Hashable, int] = {}
        self._num_timers = 0
        self._handle: Handle = machine.handle
        self.handlers: dict[type, Callable[[Any], object]] = {
            Send: lambda action: self.send(action.peer, action.message),
            Connect: lambda action: self.connections.__setitem__(action.peer, action.address),
            Disconnect: lambda action: self.connections.pop(action.peer, None),
            SetTimer: self._set_timer,
            CancelTimer: lambda action: self._timers.pop(action.key, None),
            Ready: lambda _: None,
            Log: self.log.append,
            PublishKVEvents: self.kv_events.append,
            WriteDump: self._write_dump,
            Exit: lambda action: self.exit(action.reason),
        }
        world.add(self)

    def handle_with(self, kind: type, handler: Callable[[Any], object]) -> None:
        """Have ``handler`` perform actions of type ``kind``."""
        self.handlers[kind] = handler

    def record(self, role: str, start: object, codec: EventCodec) -> None:
        """Have all events and actions recorded, if this World wants that."""
        if self.world.recorders is not None:
            settings = RecordingSettings(max_bytes=1 << 30, actions=True)
            recorder = Recorder(peer_name(self.peer), role, start, codec, settings)
            self._handle = recorder.recorded(self._handle)
            self.world.recorders.append(recorder)

    def post(self, event: object) -> None:
        """Have ``event`` handled as soon as the present one is."""
        self.world.after(0.0, lambda: self.handle(event))

    def handle(self, event: object) -> None:
        """Let the machine take ``event`` now, and perform what it says."""
        if not self.alive:
            return
        if self.paused:
            self._backlog.append(event)
            return
        self.world.history.append((self.world.now, self.peer, event))
        for action in self._handle(event, self.world.now):
            self.handlers[type(action)](action)
        self.world.check(self)

    def _write_dump(self, action: WriteDump) -> None:
        name = peer_name(self.peer)
        self.post(DumpWritten(action.router, action.dump_id, name, f"/{name}.kvrec", ""))

    def pause(self) -> None:
        """Stand still (SIGSTOP): what happens meanwhile is handled after ``resume``."""
        self.paused = True
        self._paused_since_s = self.world.now

    def resume(self) -> None:
        """Go on after a pause (SIGCONT). The machine is told of it first; timers that became due come last."""
        self.paused = False
        backlog, self._backlog = self._backlog, []
        backlog.sort(key=lambda event: isinstance(event, TimerFired))
        for event in [Resumed(self.world.now - self._paused_since_s), *backlog]:
            self.handle(event)

    def exit(self, reason: str) -> None:
        """End, having said what there was to say."""
        self.exit_reason = reason
        self.alive = False
        self.world.remove(self)

    # ------------------------------------------------------------ messages

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send to ``peer``, as Transport does."""
        target = self.world.reach(self, peer)
        if target is not None:
            self.world.link.send(self.peer, target, message, tuple(payload))
        elif peer in self.connections:
            self.world.keep(self.connections[peer], self, message)
        else:
            self.post(PeerLost(peer, "Host unreachable"))

    def receive(self, source: Process, message: Message, payload: tuple[memoryview, ...]) -> None:
        """Take a message, unless the connection it came by is gone."""
        # Of two connections to one address the later takes the other's place at the far end (ROUTER_HANDOVER).
        labels = [label for label, address in self.connections.items() if address in source.addresses]
        label = labels[-1] if labels else None
        if label is None and any(address in self.addresses for address in source.connections.values()):
            label = self.aliases.get(source.peer, source.peer)
        if label is not None:
            encoded = b"" if self.world.recorders is None else encode(message)
            self.handle(Received(label, message, payload, encoded))

    # ------------------------------------------------------------ timers

    def _set_timer(self, action: SetTimer) -> None:
        self._num_timers += 1
        number = self._timers[action.key] = self._num_timers

        def fire() -> None:
            if self._timers.get(action.key) == number:
                del self._timers[action.key]
                self.handle(TimerFired(action.key))

        self.world.after(max(0.0, action.at_s - self.world.now), fire)


class RouterProcess(Process):
    """The router; what it delivers goes to the World's clients."""

    machine: RouterMachine

    def __init__(self, world: World, settings: RouterSettings) -> None:
        super().__init__(world, ROUTER, RouterMachine(settings), [CONTROL])
        self.record(ROUTER, settings, ROUTER_EVENTS)
        self.handle_with(Deliver, world.deliver)
        self.handle_with(CacheResetEnded, world.cache_resets.append)
        self.handle_with(DumpReported, world.dumps.append)
        self.post(Started())


class NodeProcess(Process):
    """A node with its engine and, unless it is mixed, its messager.

    ``failing_steps``: those in which the engine breaks. ``device_lost_in``: the step from which on its device is lost.
    ``layers_at_once``: how many layers it announces together.
    """

    machine: PrefillMachine | DecodeMachine

    def __init__(self, world: World, config: NodeConfig, incarnation: str) -> None:
        self.config = config
        self.failing_steps: set[int] = set()
        self.device_lost_in: int | None = None
        self.layers_at_once = world.layers_at_once
        self._plans: deque[StepPlan] = deque()
        self.engine = FakeEngine(config.engine.fake, config.cache.block_size, config.cache.fixed_num_blocks)
        me = peer_id(config.name, incarnation)
        kind = PrefillMachine if config.role == "prefill" else DecodeMachine
        registration = self._registration(incarnation)
        machine = kind(config, registration, self.engine.max_plans_in_flight)
        super().__init__(world, me, machine, [config.address, f"ipc:///{me}"])
        start = NodeStart.of(config, registration, self.engine.max_plans_in_flight)
        self.record(config.role, start, NODE_EVENTS)
        self.connections[ROUTER] = CONTROL
        self.handle_with(RunStep, self._run_step)
        FakeStorageIO(self, world.store)
        self.messager: MessagerProcess | None = None
        if config.role != "mixed":
            self.messager = MessagerProcess(world, self)
            self.aliases[self.messager.peer] = MESSAGER
        self.post(Started())

    def _registration(self, incarnation: str) -> Register:
        config = self.config
        return Register(
            node_id=NodeId(config.name),
            incarnation=incarnation,
            role=config.role,
            address=config.address,
            pid=1,
            model=config.model.name,
            max_model_len=self.engine.max_model_len,
            max_num_seqs=config.scheduler.max_num_seqs,
            num_blocks=config.cache.fixed_num_blocks,
            geometry=self.engine.geometry,
            vocab_size=self.engine.vocab_size,
            prefill_order=config.scheduler.prefill_order,
            resets_prefix_cache=True,
            can_dump=True,
        )

    def _run_step(self, action: RunStep) -> None:
        """Begin a step, or queue it as a device would."""
        assert action.plan.num_tokens <= self.config.scheduler.max_num_batched_tokens, "a step beyond the token budget"
        self._plans.append(action.plan)
        assert len(self._plans) <= self.engine.max_plans_in_flight, "more plans than the engine takes"
        if len(self._plans) == 1:
            self._begin_step(action.plan)

    def _begin_step(self, plan: StepPlan) -> None:
        """Let virtual time pass between the layers.

        A block that is given away while the step still runs is written to after that, and one that is read before its
        time has not been written yet: what would be a race between threads shows as a wrong token.
        """
        layers = self.engine.layers(plan)
        layer_s = step_seconds(self.config.engine.fake, plan.batch) / self.engine.geometry.num_layers

        def advance(layers: Iterator[int | StepResult] = layers) -> None:
            if not self.alive:
                return
            done = next(layers)
            if self.device_lost_in is not None and plan.step >= self.device_lost_in:
                self._end_step(EngineLost("told to"))
                return
            if isinstance(done, StepResult):
                self._end_step(StepDone(done))
                return
            last = done == self.engine.geometry.num_layers - 1
            first = done // self.layers_at_once * self.layers_at_once
            if self.config.role == "prefill" and (last or done + 1 == first + self.layers_at_once):
                self.handle(LayersComputed(plan.step, range(first, done + 1)))
            if plan.step in self.failing_steps and done == 0:
                self._end_step(StepFailed(plan.step, "ValueError: told to"))
                return
            self.world.after(0.0 if last else layer_s, advance)

        self.world.after(layer_s, advance)

    def _end_step(self, event: StepDone | StepFailed | EngineLost) -> None:
        """Answer the plan, and go on with the next one at once."""
        self._plans.popleft()
        if self._plans:
            self._begin_step(self._plans[0])
        self.handle(event)

    def exit(self, reason: str) -> None:
        """End; the messager sees its lifeline cut."""
        super().exit(reason)
        if self.messager is not None:
            self.messager.post(PeerLost(self.peer, "its end of the pipe is closed"))


class MessagerProcess(Process):
    """A node's cache messager, with the real mover of blocks on the node's real pool."""

    machine: MessagerMachine

    def __init__(self, world: World, node: NodeProcess) -> None:
        self.node = node
        settings = MessagerSettings.for_node(
            node.config,
            node=node.peer,
            node_address=f"ipc:///{node.peer}",
            geometry=node.engine.geometry,
            pool=node.engine.memory.handle,
            runtime_dir="/nonexistent",
        )
        # The kind nixl has a thread of its own, which knows no virtual time.
        settings = replace(settings, links=tuple(kind for kind in settings.links if kind != "nixl"))
        link = LinkAddress(
            peer=settings.me, host_id=node.config.host, tcp=f"tcp://{settings.me}", ipc=f"ipc:///{settings.me}"
        )
        # Its own mapping, as in a process of its own: the pool outlives the node as long as frames are read from it.
        self._pool = open_pool(settings.geometry, settings.pool)
        self.mover = BlockMover(settings, self._pool)
        machine = MessagerMachine(settings, link, self.mover.offers)
        super().__init__(world, settings.me, machine, [link.tcp, link.ipc])
        self.record(MESSAGER, MessagerStart.of(settings, link, self.mover.offers), MESSAGER_EVENTS)
        self.connections[node.peer] = f"ipc:///{node.peer}"
        self.mover.serve(self, self)
        write_now, drop_now = self.handlers[WriteBlocks], self.handlers[DropLink]
        self.handle_with(WriteBlocks, lambda action: self._later(self._write_s(), action, write_now))
        # After the writes in progress, as of every link.
        self.handle_with(DropLink, lambda action: self._later(MAX_WRITE_S, action, drop_now))
        self.post(Started())

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        """Call at once: everything is on one thread here."""
        call()

    def _write_s(self) -> float:
        return MAX_WRITE_S / 2 * (1 + self.world.link.rng.random())

    def _later(self, delay_s: float, action: Work, perform: Callable[[Any], object]) -> None:
        def perform_if_alive() -> None:
            if self.alive:
                perform(action)

        self.world.after(delay_s, perform_if_alive)

    def exit(self, reason: str) -> None:
        """End; the node sees its child end."""
        super().exit(reason)
        self.node.post(PeerLost(MESSAGER, "it exited with status 0"))

    def close(self) -> None:
        """Give all mappings back."""
        self.mover.close()
        self._pool.close()
