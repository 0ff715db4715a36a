"""The cache messager's state machine."""

from __future__ import annotations

from collections.abc import Sequence

from cache_messager.counters import new_counters
from cache_messager.receiver import Receiver
from cache_messager.sender import Sender
from cache_messager.settings import MessagerSettings
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent, LinkReady, Work
from kvrelay.machine.contract import (
    CoreAction,
    Exit,
    Log,
    PeerLost,
    Received,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
)
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.machine.unexpected import COUNTER, UnexpectedMessages
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Heartbeat, LinkAddress, Message
from kvrelay.protocol.messages.messager_to_messager import (
    FrameAck,
    KVFrame,
    LinkAccepted,
    LinkHello,
    LinkOffer,
    LinkRefused,
)
from kvrelay.protocol.messages.messager_to_node import MessagerReady, MessagerStats
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CancelKV,
    CloseTransfer,
    ExpectKV,
    LayerSignal,
    OpenTransfer,
    StopMessager,
)

HEARTBEAT = "heartbeat"


class MessagerMachine:
    """Moves KV blocks between its node's pool and those of other nodes.

    Events and actions: the core ones and those of ``cache_messager.work``. ``link`` is where other messagers reach this
    one; it is bound, and the pool open, before Started. ``offers``: how it may send, the best first.
    """

    def __init__(self, settings: MessagerSettings, link: LinkAddress, offers: Sequence[LinkOffer]) -> None:
        self._counters = new_counters(settings.links)
        self._settings = settings
        self._link = link
        self._outbox: RoleOutbox[Work] = RoleOutbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._sender = Sender(settings, link.host_id, offers, self._outbox.do, self._counters)
        self._receiver = Receiver(settings, self._outbox.do, self._counters)

    def handle(self, event: object, now: float) -> list[CoreAction | Work]:
        """Take ``event``; see ``kvrelay.machine.contract``."""
        self._outbox.now = now
        self._on_event(event, now)
        return self._outbox.take()

    def _on_event(self, event: object, now: float) -> None:
        match event:
            case Received(peer=peer, message=message) if peer == self._settings.node:
                self._from_node(message, now)
            case Received(peer=peer, message=message, payload=payload):
                self._sender.heard(peer, now)
                self._receiver.heard(peer, now)
                self._from_messager(peer, message, payload, now)
            case BlocksWritten():
                self._receiver.blocks_written(event, now)
            case FrameSent():
                self._sender.frame_sent(event, now)
            case LinkReady():
                self._receiver.link_ready(event, now)
            case DeviceLost(reason=reason):
                self._outbox.do(Log("error", "device lost", {"reason": reason}))
                self._leave(f"the device is lost: {reason}")
            case TimerFired(key="heartbeat"):
                self._beat(now)
            case PeerLost(peer=peer, reason=reason) if peer == self._settings.node:
                self._leave(f"the node is lost: {reason}")
            case PeerLost(peer=peer, reason=reason):
                self._sender.peer_lost(peer, reason, now)
                self._receiver.peer_lost(peer, reason, now)
            case Started():
                self._outbox.do(Send(self._settings.node, MessagerReady(link=self._link)))
                self._outbox.do(SetTimer(HEARTBEAT, now + self._settings.heartbeat_s))
            case StopRequested():
                self._outbox.do(Log("info", "signal ignored", {"reason": "the node says when to stop"}))

    def _from_node(self, message: Message, now: float) -> None:
        match message:
            case LayerSignal(layer=layer, num_layers=num_layers, spans=spans):
                for span in spans:
                    self._sender.signal(range(layer, layer + num_layers), span, now)
            case CachedSignal(span=span):
                self._sender.signal(range(self._settings.geometry.num_layers), span, now)
            case OpenTransfer():
                self._sender.open(message, now)
            case CloseTransfer():
                self._sender.close(message, now)
            case ExpectKV():
                self._receiver.expect(message, now)
            case CancelKV():
                self._receiver.cancel(message, now)
            case StopMessager():
                self._leave("the node is leaving")
            case _:
                self._unexpected.take(self._settings.node, message)

    def _from_messager(self, peer: PeerId, message: Message, payload: tuple[memoryview, ...], now: float) -> None:
        match message:
            case KVFrame():
                self._receiver.frame(peer, message, payload, now)
            case FrameAck():
                self._sender.acked(peer, message, now)
            case LinkHello():
                self._receiver.hello(peer, message, now)
            case LinkAccepted():
                self._sender.accepted(peer, message, now)
            case LinkRefused():
                self._sender.refused(peer, message, now)
            case Heartbeat():
                pass  # noted above, as any message
            case _:
                self._unexpected.take(peer, message)

    def _beat(self, now: float) -> None:
        self._outbox.do(SetTimer(HEARTBEAT, now + self._settings.heartbeat_s))
        self._sender.beat(now)
        self._receiver.beat(now)
        self._outbox.send(self._settings.node, MessagerStats(counters=self.counters, gauges=self.gauges()))

    def _leave(self, reason: str) -> None:
        self._receiver.leave()
        self._sender.leave()
        self._outbox.do(Exit(reason))

    @property
    def counters(self) -> dict[str, float]:
        """What the messager has done so far, by the name that its node gives it in its metrics."""
        return {**self._counters, f"messager_{COUNTER}": float(self._unexpected.count)}

    def gauges(self) -> dict[str, float]:
        """Return how much is going on now."""
        return {
            "pending_signals": self._sender.pending.num_signals,
            "inflight_bytes": self._sender.inflight_bytes,
            "links": self._sender.num_links + self._receiver.num_links,
        }

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless no transfer, signal, expectation, write or credit is held."""
        self._sender.assert_quiescent()
        self._receiver.assert_quiescent()
