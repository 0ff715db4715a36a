"""The cache messager's state machine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias, assert_never

from cache_messager.counters import new_counters
from cache_messager.receiver import Receiver
from cache_messager.sender import Sender
from cache_messager.settings import MessagerSettings
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent, LinkLost, LinkReady, MessagerOutbox, Work
from kvrelay.machine.contract import (
    CoreAction,
    DumpWritten,
    Exit,
    Log,
    PeerLost,
    Received,
    Resumed,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    WriteDump,
)
from kvrelay.machine.laws import Laws, require
from kvrelay.machine.self_check import SelfCheck
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
    MessagerToMessager,
)
from kvrelay.protocol.messages.messager_to_node import MessagerDumped, MessagerReady, MessagerStats
from kvrelay.protocol.messages.node_to_messager import (
    CachedSignal,
    CancelKV,
    CloseTransfer,
    DumpMessager,
    ExpectKV,
    LayerSignal,
    NodeToMessager,
    OpenTransfer,
    StopMessager,
)

HEARTBEAT = "heartbeat"
"""Key of the messager's only timer."""

MessagerEvent: TypeAlias = (
    Received
    | PeerLost
    | TimerFired
    | Started
    | Resumed
    | StopRequested
    | DumpWritten
    | BlocksWritten
    | DeviceLost
    | FrameSent
    | LinkLost
    | LinkReady
)
LinkMessage: TypeAlias = MessagerToMessager | Heartbeat
"""Messages a messager accepts from other messagers."""


class MessagerMachine:
    """Moves KV blocks between its node's pool and those of other nodes.

    Events and actions: the core ones and those of ``cache_messager.work``. ``link``: the address of this messager for
    others. It is bound, and the pool open, before Started. ``offers``: links for sending, best first.
    """

    def __init__(self, settings: MessagerSettings, link: LinkAddress, offers: Sequence[LinkOffer]) -> None:
        self._node = settings.node
        self._num_layers = settings.geometry.num_layers
        self._heartbeat_s = settings.heartbeat_s
        self._link = link
        self._outbox = MessagerOutbox()
        self._unexpected = UnexpectedMessages(self._outbox)
        self._counters = new_counters(settings.links)
        self._sender = Sender(settings, link.host_id, offers, self._outbox, self._counters)
        self._receiver = Receiver(settings, self._outbox, self._counters)
        self._self_check = SelfCheck(settings.self_check, self.laws_at_rest, self._outbox)

    def handle(self, event: MessagerEvent, now: float) -> list[CoreAction | Work]:
        """Handle ``event``; see ``kvrelay.machine.contract``."""
        self._outbox.now = now
        self._on_event(event)
        return self._outbox.take()

    def _on_event(self, event: MessagerEvent) -> None:
        match event:
            case Received(peer=peer, message=message, payload=payload):
                self._receive(peer, message, payload)
            case BlocksWritten():
                self._receiver.blocks_written(event)
            case FrameSent():
                self._sender.frame_sent(event)
            case LinkReady():
                self._receiver.link_ready(event)
            case LinkLost(peer=peer, reason=reason):
                self._sender.link_lost(peer, reason)
            case DeviceLost(reason=reason):
                self._outbox.do(Log("error", "device lost", {"reason": reason}))
                self._leave(f"the device is lost: {reason}")
            case TimerFired():
                self._beat()
            case PeerLost(peer=peer, reason=reason):
                self._peer_lost(peer, reason)
            case Started() | Resumed() | StopRequested() | DumpWritten():
                self._on_process_event(event)
            case _:
                assert_never(event)

    def _on_process_event(self, event: Started | Resumed | StopRequested | DumpWritten) -> None:
        match event:
            case Started():
                self._tell_ready()
                self._set_heartbeat()
            case Resumed(paused_s=paused_s):
                self._sender.resumed(paused_s)
                self._receiver.resumed(paused_s)
            case StopRequested():
                self._outbox.do(Log("info", "signal ignored", {"reason": "the node says when to stop"}))
            case DumpWritten(router=router, dump_id=dump_id, process=process, path=path, error=error):
                dumped = MessagerDumped(router=router, dump_id=dump_id, process=process, path=path, error=error)
                self._outbox.send(self._node, dumped)
            case _:
                assert_never(event)

    def _receive(self, peer: PeerId, message: Message, payload: tuple[memoryview, ...]) -> None:
        if peer == self._node:
            if isinstance(message, NodeToMessager):
                self._from_node(message)
            else:
                self._unexpected.take(peer, message)
            return
        self._sender.record_message(peer)
        self._receiver.record_message(peer)
        if isinstance(message, LinkMessage):
            self._from_messager(peer, message, payload)
        else:
            self._unexpected.take(peer, message)

    def _from_node(self, message: NodeToMessager) -> None:
        match message:
            case LayerSignal(layer=layer, num_layers=num_layers, spans=spans):
                for span in spans:
                    self._sender.signal(range(layer, layer + num_layers), span)
            case CachedSignal(span=span):
                self._sender.signal(range(self._num_layers), span)
            case OpenTransfer():
                self._sender.open(message)
            case CloseTransfer():
                self._sender.close(message)
            case ExpectKV():
                self._receiver.expect(message)
            case CancelKV():
                self._receiver.cancel(message)
            case DumpMessager(router=router, dump_id=dump_id, with_prompts=with_prompts):
                self._outbox.do(WriteDump(router, dump_id, with_prompts))
            case StopMessager():
                self._leave("the node is leaving")
            case _:
                assert_never(message)

    def _from_messager(self, peer: PeerId, message: LinkMessage, payload: tuple[memoryview, ...]) -> None:
        match message:
            case KVFrame():
                self._receiver.frame(peer, message, payload)
            case FrameAck():
                self._sender.acked(peer, message)
            case LinkHello():
                self._receiver.hello(peer, message)
            case LinkAccepted():
                self._sender.accepted(peer, message)
            case LinkRefused():
                self._sender.refused(peer, message)
            case Heartbeat():
                pass  # any message counts as a heartbeat
            case _:
                assert_never(message)

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        if peer == self._node:
            self._leave(f"the node has ended or is lost: {reason}")
        else:
            self._sender.peer_lost(peer, reason)
            self._receiver.peer_lost(peer, reason)

    def _beat(self) -> None:
        self._set_heartbeat()
        self._tell_ready()  # the first may have been lost
        self._sender.beat()
        self._receiver.beat()
        self._self_check.beat(self._activity())
        self._outbox.send(
            self._node,
            MessagerStats(
                counters=self.counters, gauges=self.gauges(), link_bytes_per_s=self._sender.link_bytes_per_s()
            ),
        )

    def _tell_ready(self) -> None:
        self._outbox.send(self._node, MessagerReady(link=self._link))

    def _set_heartbeat(self) -> None:
        self._outbox.do(SetTimer(HEARTBEAT, self._outbox.now + self._heartbeat_s))

    def _leave(self, reason: str) -> None:
        self._receiver.leave()
        self._sender.leave()
        self._outbox.do(Exit(reason))

    @property
    def counters(self) -> dict[str, float]:
        """Totals by their names in the node's metrics."""
        common = {COUNTER: self._unexpected.count, **self._self_check.counters}
        return {**self._counters, **{f"messager_{name}": float(count) for name, count in common.items()}}

    def gauges(self) -> dict[str, float]:
        """Return the current values by their names in the node's metrics."""
        return {
            "pending_signals": self._sender.num_pending_signals,
            "inflight_bytes": self._sender.inflight_bytes,
            "links": self._sender.num_links + self._receiver.num_links,
        }

    def laws_at_rest(self) -> Laws:
        """Check that no transfer, signal, expectation, write or credit is held; see ``kvrelay.machine.laws``."""
        yield from self._sender.laws_at_rest()
        yield from self._receiver.laws_at_rest()

    def _activity(self) -> Hashable:
        begun = (self._sender.activity, self._receiver.activity)
        return None if None in begun else begun

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless no transfer, signal, expectation, write or credit is held."""
        require(self.laws_at_rest(), "the messager is not quiescent")
