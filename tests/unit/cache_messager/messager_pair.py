"""Two real messagers, P's and D's, with real pools and links, on a network of plain queues.

Every (sender, receiver) pair of processes has a queue in order; which queue moves next is drawn, seeded. The pools are
watched all the time: P's blocks are scribbled over as soon as P is told that nothing reads them, D's must not change
once D is told that nothing writes to them, and no block may be written twice.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, cast

import msgspec
import numpy as np
from pools import Pool, fastest, make_pool, wrote
from support.ids import block_ids

from cache_messager.machine import MessagerMachine
from cache_messager.mover import BlockMover
from cache_messager.settings import MessagerSettings
from cache_messager.work import AcceptLink, DropLink, LeaveLink, OpenLink, SendFrame, WriteBlocks
from kvrelay.machine.contract import (
    CancelTimer,
    Connect,
    Disconnect,
    Exit,
    Log,
    PeerLost,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import Attempt, BlockId, PeerId
from kvrelay.protocol.kv_handle import KVHandle
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.messager_to_messager import FrameAck, KVFrame, LinkOffer
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVCancelled,
    KVFailed,
    TransferClosed,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CancelKV,
    CloseTransfer,
    ExpectKV,
    KVSpan,
    LayerSignal,
    OpenTransfer,
)

GEOMETRY = KVGeometry(
    num_layers=3, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32", model_digest="model", layout="NHD"
)
NUM_BLOCKS = 64
BLOCK_BYTES = GEOMETRY.layer_block_bytes

P_NODE, P, D, D_NODE = (PeerId(name) for name in ("p0#1", "p0.messager#1", "d0.messager#1", "d0#1"))
SERVICE = PeerId("service")
"""Where the actions that a messager's service performs come from."""
NODE_OF = {P: P_NODE, D: D_NODE}

SCRIBBLE = 0xEE

Channel = tuple[PeerId, PeerId]
Item = object


@dataclass
class Endpoint:
    """One messager with its pool, and what its node was told."""

    machine: MessagerMachine
    pool: Pool
    mover: BlockMover
    handlers: dict[type, Callable[[Any], None]] = field(default_factory=dict)
    timers: dict[Hashable, float] = field(default_factory=dict)
    told: list[Message] = field(default_factory=list)
    exit_reason: str | None = None
    logs: list[Log] = field(default_factory=list)


class _Service:
    """What a mover needs of transport and shell; its events are handled in their turn."""

    def __init__(self, pair: Pair, me: PeerId, end: Endpoint) -> None:
        self._pair = pair
        self._me = me
        self._end = end

    def handle_with(self, kind: type, handler: Callable[[Any], None]) -> None:
        self._end.handlers[kind] = handler

    def send(self, peer: PeerId, message: Message, payload: Sequence[memoryview] = ()) -> None:
        self._pair.transmit(self._me, peer, message, tuple(payload))

    def post(self, event: object) -> None:
        self._pair.channels[SERVICE, self._me].append(event)

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        raise AssertionError("everything is on one thread here")


def settings(me: PeerId, pool: KVHandle, **changes: object) -> MessagerSettings:
    base = MessagerSettings(
        me=me,
        node=NODE_OF[me],
        node_address="ipc:///nowhere",
        geometry=GEOMETRY,
        pool=pool,
        host="127.0.0.1",
        runtime_dir="/nowhere",
        max_inflight_bytes=1 << 16,
    )
    return msgspec.structs.replace(base, **changes)


class Pair:
    """P's messager and D's messager, started, with their queues empty. Close it when done.

    With pools ``on_device``, the link cuda takes the place of shm. ``p`` and ``d`` change settings of P's messager and
    of D's, ``on_device`` among them.
    """

    on_device: ClassVar[bool] = False

    def __init__(
        self,
        seed: int = 0,
        *,
        hosts: tuple[str, str] = ("host", "host"),
        d: dict[str, object] | None = None,
        **p: object,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.channels: defaultdict[Channel, deque[Item]] = defaultdict(deque)
        self.on_wire: Callable[[PeerId, PeerId, Message], list[Message]] = lambda _src, _dst, message: [message]
        self.corrupt_payload = False
        self.can_map = True
        self.connections: set[PeerId] = set()
        self.sources: dict[Attempt, list[BlockId]] = {}
        self.targets: dict[Attempt, list[BlockId]] = {}
        self.writable: dict[BlockId, Attempt] = {}
        self.writes: Counter[tuple[Attempt, int, int]] = Counter()
        self.unacked: dict[tuple[str, int, int, int], int] = {}
        self.max_unacked_bytes = 0
        self.frames: list[KVFrame] = []
        self.moved: list[Message] = []
        self.ends = {P: self._endpoint(P, hosts[0], p), D: self._endpoint(D, hosts[1], d or {})}
        rng = np.random.default_rng(seed)
        self.ends[P].pool.planes[:] = rng.integers(0, 255, self.ends[P].pool.planes.shape, np.uint8)
        wrote(self.ends[P].pool)
        self.original = self.ends[P].pool.planes.copy()
        for me in (P, D):
            self.feed(me, Started())

    def _endpoint(self, me: PeerId, host: str, changes: dict[str, object]) -> Endpoint:
        geometry = changes.get("geometry", GEOMETRY)
        assert isinstance(geometry, KVGeometry)
        on_device = bool(changes.pop("on_device", self.on_device))
        pool = make_pool(geometry, NUM_BLOCKS, on_device=on_device)
        link = LinkAddress(peer=me, host_id=host, tcp=f"tcp://{me}", ipc=f"ipc://{me}")
        links = cast(tuple[str, ...], changes.get("links", ("shm", "ipc", "tcp")))
        links = tuple(kind for kind in links if kind != "nixl")  # it has a thread of its own
        if "cuda" not in links:
            links = tuple(self.fastest if kind == "shm" else kind for kind in links)
        chosen = settings(me, pool.handle, **{**changes, "links": links})
        mover = BlockMover(chosen, pool)
        end = Endpoint(MessagerMachine(chosen, link, mover.offers), pool, mover)
        service = _Service(self, me, end)
        mover.serve(service, service)
        return end

    def close(self) -> None:
        for end in self.ends.values():
            end.mover.close()
            end.pool.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ what nodes say

    def say(self, me: PeerId, message: Message) -> None:
        self.channels[NODE_OF[me], me].append(decode(encode(message)))

    def expect(self, attempt: Attempt, targets: list[BlockId], first_block: int = 0) -> None:
        self.targets[attempt] = targets
        self.writable |= dict.fromkeys(targets, attempt)
        self.say(D, ExpectKV(**attempt._asdict(), first_block=first_block, target_block_ids=targets, sender=P))

    def open(self, attempt: Attempt, targets: list[BlockId], first_block: int = 0) -> None:
        link = LinkAddress(peer=D, host_id=self.ends[D].machine._link.host_id, tcp=f"tcp://{D}", ipc=f"ipc://{D}")
        message = OpenTransfer(**attempt._asdict(), link=link, first_block=first_block, target_block_ids=targets)
        self.say(P, message)

    def signal(self, attempt: Attempt, layer: int, first_block: int, sources: list[BlockId]) -> None:
        self.signal_layers(attempt, range(layer, layer + 1), sources, first_block)

    def signal_layers(self, attempt: Attempt, layers: range, sources: list[BlockId], first_block: int = 0) -> None:
        span = KVSpan(attempt.request_id, attempt.epoch, first_block, sources[first_block:])
        self.say(P, LayerSignal(step=1, layer=layers.start, num_layers=len(layers), spans=[span]))

    def signal_all(self, attempt: Attempt, sources: list[BlockId]) -> None:
        self.sources[attempt] = sources
        for layer in range(GEOMETRY.num_layers):
            self.signal(attempt, layer, 0, sources)

    def cached(self, attempt: Attempt, sources: list[BlockId]) -> None:
        self.say(P, CachedSignal(span=KVSpan(attempt.request_id, attempt.epoch, 0, sources)))

    def close_transfer(self, attempt: Attempt) -> None:
        self.say(P, CloseTransfer(**attempt._asdict()))

    def cancel(self, attempt: Attempt) -> None:
        self.say(D, CancelKV(**attempt._asdict()))

    # ------------------------------------------------------------ the network

    def feed(self, me: PeerId, event: Any) -> None:
        end = self.ends[me]
        if end.exit_reason is None:
            for action in end.machine.handle(event, self.now):
                self._perform(me, end, action)

    def _perform(self, me: PeerId, end: Endpoint, action: object) -> None:
        match action:
            case Send(peer=peer, message=message) if peer == NODE_OF[me]:
                end.told.append(decode(encode(message)))
                self._watch_told(me, message)
            case Send(peer=peer, message=message):
                self.transmit(me, peer, message, ())
            case SendFrame(frame=frame):
                self._watch_sent(frame)
                end.handlers[SendFrame](action)
            case WriteBlocks() | AcceptLink() | DropLink():
                self.channels[SERVICE, me].append(action)
            case OpenLink() | LeaveLink():
                end.handlers[type(action)](action)
            case Connect(peer=peer):
                assert peer not in self.connections, "connected twice"
                self.connections.add(peer)
            case Disconnect(peer=peer):
                self.connections.discard(peer)
                self.channels[me, peer].clear()
                self.channels[peer, me].clear()
                self.unacked.clear()
            case SetTimer(key=key, at_s=at_s):
                end.timers[key] = at_s
            case CancelTimer(key=key):
                end.timers.pop(key, None)
            case Exit(reason=reason):
                end.exit_reason = reason
            case Log():
                end.logs.append(action)
            case _:
                raise AssertionError(f"unknown action {action}")

    def transmit(self, me: PeerId, peer: PeerId, message: Message, parts: tuple[memoryview, ...]) -> None:
        for copy in self.on_wire(me, peer, decode(encode(message))):
            self.channels[me, peer].append((copy, parts))

    def step(self, channels: list[Channel] | None = None) -> bool:
        """Deliver the oldest item of one queue; return whether there was one."""
        busy = [
            channel for channel, queue in self.channels.items() if queue and (channels is None or channel in channels)
        ]
        if not busy:
            return False
        source, me = channel = self.rng.choice(busy)
        item = self.channels[channel].popleft()
        if source == SERVICE:
            self._serve(me, item)
        elif source in NODE_OF.values():
            assert isinstance(item, Message)
            self.feed(me, Received(source, item))
        else:
            assert isinstance(item, tuple)
            message, parts = item
            self._watch_delivered(message)
            self.moved.append(message)
            # Views are read only now, as ZMQ's thread does: whoever changed the blocks meanwhile spoils them.
            payload = tuple(memoryview(bytes(part)) for part in parts)
            if self.corrupt_payload and payload:
                payload = (memoryview(bytes([payload[0][0] ^ 1]) + bytes(payload[0][1:])), *payload[1:])
            self.feed(me, Received(source, message, payload))
        return True

    def run(self, channels: list[Channel] | None = None) -> None:
        """Deliver until nothing is queued."""
        while self.step(channels):
            pass

    def _serve(self, me: PeerId, action: object) -> None:
        end = self.ends[me]
        match action:
            case AcceptLink(link_id=link_id, offers=offers) if not self.can_map:
                offers = [LinkOffer(offer.kind, b"spoilt") for offer in offers]  # payload links need nothing
                end.handlers[AcceptLink](AcceptLink(link_id, offers))
            case AcceptLink() | DropLink():
                end.handlers[type(action)](action)
            case WriteBlocks(frame=frame):
                self._watch_written(frame)
                end.handlers[WriteBlocks](action)
            case _:
                self.feed(me, action)

    def advance(self, seconds: float) -> None:
        """Let time pass, a heartbeat at a time, with everything delivered in between."""
        until = self.now + seconds
        while due := [at_s for end in self.ends.values() for at_s in end.timers.values() if at_s <= until]:
            self.now = max(self.now, min(due))
            for me, end in self.ends.items():
                for key in [key for key, at_s in end.timers.items() if at_s <= self.now]:
                    del end.timers[key]
                    self.feed(me, TimerFired(key))
            self.run()
        self.now = until

    def lose(self, me: PeerId, peer: PeerId) -> None:
        self.channels[peer, me].clear()
        self.feed(me, PeerLost(peer, "gone"))

    # ------------------------------------------------------------ what must always hold

    def _watch_told(self, me: PeerId, message: Message) -> None:
        match message:
            case TransferDone() | TransferFailed() | TransferClosed():
                attempt = Attempt(message.request_id, message.epoch)
                for block in self.sources.get(attempt, []):
                    self.ends[me].pool.planes[:, :, block] = SCRIBBLE
            case KVArrived() | KVFailed() | KVCancelled():
                attempt = Attempt(message.request_id, message.epoch)
                self.writable = {block: owner for block, owner in self.writable.items() if owner != attempt}

    def _watch_sent(self, frame: KVFrame) -> None:
        self.frames.append(frame)
        self.unacked[frame.request_id, frame.epoch, frame.layer, frame.first_block] = frame.num_bytes
        self.max_unacked_bytes = max(self.max_unacked_bytes, sum(self.unacked.values()))

    def _watch_delivered(self, message: Message) -> None:
        if isinstance(message, FrameAck):
            self.unacked.pop((message.request_id, message.epoch, message.layer, message.first_block), None)

    def _watch_written(self, frame: KVFrame) -> None:
        attempt = Attempt(frame.request_id, frame.epoch)
        for layer, block in product(frame.layers, frame.target_block_ids):
            assert self.writable.get(block) == attempt, f"{attempt} wrote to block {block}, which is not its own"
            self.writes[attempt, layer, block] += 1
            assert self.writes[attempt, layer, block] == 1, f"block {block} was written twice"

    # ------------------------------------------------------------ what tests ask

    def told(self, me: PeerId, *kinds: type[Message]) -> list[Message]:
        return [message for message in self.ends[me].told if isinstance(message, kinds)]

    def endings(self, me: PeerId, attempt: Attempt) -> list[str]:
        """Return the names of the terminal messages the node got about ``attempt``."""
        kinds = (TransferDone, TransferFailed, TransferClosed, KVArrived, KVFailed, KVCancelled)
        return [
            type(message).__name__
            for message in self.told(me, *kinds)
            if Attempt(message.request_id, message.epoch) == attempt  # type: ignore[attr-defined]
        ]

    def assert_moved(self, attempt: Attempt, first_block: int = 0) -> None:
        """Assert that D's blocks hold what P's held."""
        sources, targets = self.sources[attempt][first_block:], self.targets[attempt]
        arrived, expected = self.ends[D].pool.planes[:, :, targets], self.original[:, :, sources]
        assert np.array_equal(arrived, expected), f"{attempt}: D's blocks differ from P's"

    def assert_quiescent(self) -> None:
        for end in self.ends.values():
            end.machine.assert_quiescent()

    @property
    def fastest(self) -> str:
        """The kind of link that copies from pool to pool."""
        return fastest(self.on_device)

    def num_accepted(self, me: PeerId) -> int:
        """Return how many links the service of ``me`` holds something for."""
        return len(self.ends[me].mover._accepted)

    def counter(self, me: PeerId, name: str) -> float:
        return self.ends[me].machine.counters[name]


def one_of_each(
    pair: Pair, attempt: Attempt, num_blocks: int = 4, first_block: int = 0
) -> tuple[list[BlockId], list[BlockId]]:
    """Return (sources, targets) for a transfer of ``num_blocks`` blocks, in no order, and have D expect it."""
    sources = block_ids(*pair.rng.sample(range(NUM_BLOCKS // 2), num_blocks))
    targets = block_ids(*pair.rng.sample(range(NUM_BLOCKS // 2), num_blocks - first_block))
    pair.sources[attempt] = sources
    pair.expect(attempt, targets, first_block)
    return sources, targets
