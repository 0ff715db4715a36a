"""P's half of the messager: layer signals in, frames out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache_messager.block_mask import all_within
from cache_messager.counters import Counters, links_counter
from cache_messager.pending import PendingCount, PendingSignal
from cache_messager.sender_link import SenderLink, choose_route
from cache_messager.settings import MessagerSettings
from cache_messager.transfer import FrameKey, Transfer, TransferStatus
from cache_messager.work import FrameSent, SendFrame, Work
from kvrelay.errors import (
    CorruptKVError,
    GeometryMismatchError,
    KVRelayError,
    LocalProtocolError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from kvrelay.machine.contract import Connect, CoreAction, Disconnect, Log, Send
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.recent import Recent
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, Message
from kvrelay.protocol.messages.messager_to_messager import FrameAck, LinkAccepted, LinkHello, LinkOffer, LinkRefused
from kvrelay.protocol.messages.messager_to_node import TransferClosed, TransferDone, TransferFailed
from kvrelay.protocol.messages.node_to_messager import CloseTransfer, KVSpan, OpenTransfer

Emit = Callable[[CoreAction | Work], None]
"""Takes one action."""


class Sender:
    """All transfers out of this node's pool, and the links they share.

    What it owes its node: for each OpenTransfer one TransferDone or TransferFailed, unless a CloseTransfer comes first;
    for each CloseTransfer one TransferClosed; and none of them while the blocks may still be read.
    """

    def __init__(
        self, settings: MessagerSettings, host_id: str, offers: Sequence[LinkOffer], emit: Emit, counters: Counters
    ) -> None:
        self._settings = settings
        self._offers = offers
        self._geometry = settings.geometry
        self._host_id = host_id
        self._emit = emit
        self._counters = counters
        self._transfers: dict[Attempt, Transfer] = {}
        self._ended: Recent[type[Message]] = Recent()
        self._links: dict[PeerId, SenderLink] = {}
        self._liveness = Liveness(settings.peer_timeout_s)
        self.pending = PendingCount()

    # ------------------------------------------------------------ from the node

    def signal(self, layers: range, span: KVSpan, now: float) -> None:
        """Blocks are complete in ``layers``: send them, or keep the signal until the transfer is opened."""
        attempt = Attempt(span.request_id, span.epoch)
        if self._ended.get(attempt) is not None:
            return  # sent before the node knew
        transfer = self._transfer(attempt, now)
        if transfer.status is TransferStatus.DRAINING:
            return
        problem = self._problem_with(layers, span)
        if problem is not None:
            self._fail(transfer, LocalProtocolError(problem), now)
        elif transfer.status is TransferStatus.PENDING:
            self._keep(transfer, PendingSignal(layers, span), now)
        else:
            self._queue(transfer, layers, span, now)
            self._pump(self._links[transfer.peer], now)

    def open(self, message: OpenTransfer, now: float) -> None:
        """D has reserved blocks: send what was signalled so far."""
        attempt = Attempt(message.request_id, message.epoch)
        ending = self._ended.get(attempt)
        if ending is TransferClosed:
            error = TransferError("the transfer was closed before it was opened")
            self._answer(attempt, _failed(attempt, error))
        if ending is not None:
            return  # answered before it came, or just now
        transfer = self._transfer(attempt, now)
        if transfer.status is TransferStatus.PENDING:  # else said twice: the transfer under way is its answer
            self._begin(transfer, message, now)

    def _begin(self, transfer: Transfer, message: OpenTransfer, now: float) -> None:
        self.pending.remove(transfer.pending)
        signals = transfer.open(message, now)
        try:
            link = self._link_to(message, now)
        except TransferError as error:
            self._fail(transfer, error, now)
            return
        link.transfers[transfer] = None
        for signal in signals:
            if transfer.status is TransferStatus.SENDING:
                self._queue(transfer, signal.layers, signal.span, now)
        self._pump(link, now)
        self._finish(transfer, now)

    def close(self, message: CloseTransfer, now: float) -> None:
        """The node is done with the request: forget it as soon as nothing reads its blocks."""
        attempt = Attempt(message.request_id, message.epoch)
        closed = TransferClosed(request_id=message.request_id, epoch=message.epoch)
        transfer = self._transfers.get(attempt)
        if transfer is None:
            self._answer(attempt, closed)
        else:
            self._leave(transfer, closed, now)

    def _transfer(self, attempt: Attempt, now: float) -> Transfer:
        if attempt not in self._transfers:
            self._transfers[attempt] = Transfer(attempt, self._geometry.num_layers, now)
        return self._transfers[attempt]

    def _problem_with(self, layers: range, span: KVSpan) -> str | None:
        """Return what makes a signal impossible, or None."""
        blocks, num_blocks = span.source_block_ids, self._settings.pool.num_blocks
        if not 0 <= layers.start <= layers.stop <= self._geometry.num_layers:
            return f"layers {layers.start} to {layers.stop - 1} of {self._geometry.num_layers} were signalled"
        if not all_within(blocks, num_blocks):
            return f"a block outside the pool of {num_blocks} was signalled"
        if not 0 <= span.first_block <= num_blocks:
            return f"block {span.first_block} of a request was signalled, the pool has {num_blocks}"
        return None

    def _keep(self, transfer: Transfer, signal: PendingSignal, now: float) -> None:
        if not self.pending.has_room(signal):
            self._fail(transfer, TransferError("too many blocks signalled that no decode node has taken yet"), now)
            return
        transfer.pending.append(signal)
        self.pending.add(signal)
        self._counters["pending_signals_total"] += 1

    # ------------------------------------------------------------ sending

    def _queue(self, transfer: Transfer, layers: range, span: KVSpan, now: float) -> None:
        try:
            for layer in layers:
                transfer.signal(layer, span, now)
        except LocalProtocolError as error:
            self._fail(transfer, error, now)
            return
        if self._may_send(transfer):
            self._links[transfer.peer].enqueue(transfer)

    def _may_send(self, transfer: Transfer) -> bool:
        return self._settings.layerwise or transfer.is_signalled

    def _pump(self, link: SenderLink, now: float) -> None:
        """Send as much as the credit allows, one frame of each transfer in turn."""
        block_bytes = self._geometry.layer_block_bytes
        max_blocks = link.blocks_per_frame(block_bytes)
        while link.ready:
            transfer = link.ready[0]
            num_bytes = min(max_blocks, len(transfer.queue[0].block_ids)) * block_bytes
            if not link.has_room(num_bytes):
                return
            link.ready.popleft()
            self._send_frame(link, transfer, min(max_blocks, link.room_bytes // block_bytes), now)
            link.enqueue(transfer)

    def _send_frame(self, link: SenderLink, transfer: Transfer, max_blocks: int, now: float) -> None:
        blocks = transfer.next_frame(max_blocks)
        num_bytes = blocks.num_blocks * self._geometry.layer_block_bytes
        frame = transfer.send(blocks, num_bytes, now=now)
        link.took(num_bytes)
        self._counters["frames_sent"] += 1
        self._counters["bytes_sent"] += num_bytes
        self._emit(SendFrame(link.peer, link.kind, frame, blocks.block_ids))

    def frame_sent(self, event: FrameSent, now: float) -> None:
        """The link has read what it needed of the blocks, or it cannot send them: then the transfer fails."""
        transfer = self._transfers[Attempt(event.frame.request_id, event.frame.epoch)]
        key = FrameKey.of(event.frame)
        transfer.reading.remove(key)
        link = self._links.get(transfer.peer)
        if event.error is not None:
            if link is not None and transfer.inflight.pop(key, None) is not None:
                link.returned(event.frame.num_bytes)
            if transfer.status is TransferStatus.SENDING:
                self._fail(transfer, event.error, now)
        self._finish(transfer, now)
        if link is not None:
            self._pump(link, now)

    # ------------------------------------------------------------ links

    def _link_to(self, message: OpenTransfer, now: float) -> SenderLink:
        """Return the link to D's messager, opened if there is none. Raises TransferError if there cannot be one."""
        peer = message.link.peer
        if peer in self._links:
            return self._links[peer]
        route = choose_route(self._offers, self._host_id, message.link)
        link = self._links[peer] = SenderLink(peer, route.offers)
        self._liveness.watch(peer, now)
        self._emit(Connect(peer, route.address))
        self._emit(Send(peer, LinkHello(geometry=self._geometry, offers=route.offers)))
        return link

    def accepted(self, peer: PeerId, message: LinkAccepted, now: float) -> None:
        """D's messager takes frames on this link."""
        link = self._links.get(peer)
        if link is None or link.kind:
            return
        if message.credit_bytes < self._geometry.layer_block_bytes:
            self._lose_link(link, TransferError(f"{peer} has no room for even one block"), now)
            return
        try:
            link.accept(message.kind, message.credit_bytes)
        except TransferError as error:
            self._lose_link(link, error, now)
            return
        self._counters[links_counter(link.kind)] += 1
        self._emit(Log("info", "link open", {"peer": peer, "link": link.kind}))
        self._pump(link, now)

    def refused(self, peer: PeerId, message: LinkRefused, now: float) -> None:
        """D's messager takes no frames on this link, or none any more."""
        link = self._links.get(peer)
        if link is not None:
            kind = GeometryMismatchError if message.code == GeometryMismatchError.code else TransferError
            self._lose_link(link, kind(f"{peer} refused the link: {message.reason}"), now)

    def peer_lost(self, peer: PeerId, reason: str, now: float) -> None:
        """Nothing reaches ``peer`` any more."""
        link = self._links.get(peer)
        if link is not None:
            self._lose_link(link, PeerLostError(f"{peer} is lost: {reason}"), now)

    def _lose_link(self, link: SenderLink, error: TransferError, now: float) -> None:
        """Drop the link with all that is queued on it: nothing reads P's blocks for it from here on."""
        del self._links[link.peer]
        self._liveness.forget(link.peer)
        self._counters["links_lost"] += 1
        self._emit(Log("warning", "link lost", {"peer": link.peer, "reason": error.message}))
        self._emit(Disconnect(link.peer))
        for transfer in list(link.transfers):
            transfer.inflight.clear()
            if transfer.status is TransferStatus.SENDING:
                self._fail(transfer, error, now)
            else:
                self._finish(transfer, now)

    # ------------------------------------------------------------ acknowledgements

    def acked(self, peer: PeerId, ack: FrameAck, now: float) -> None:
        """D's messager is done with a frame: its credit is back, and it is written or the transfer fails."""
        link = self._links.get(peer)
        transfer = self._transfers.get(Attempt(ack.request_id, ack.epoch))
        frame = None
        if link is not None and transfer is not None and transfer.peer == peer:
            frame = transfer.inflight.pop(FrameKey.of(ack), None)
        if link is None or transfer is None or frame is None:
            self._counters["unexpected_acks"] += 1
            return
        link.returned(frame.num_bytes)
        if ack.status == "written":
            transfer.written(frame, now)
        elif transfer.status is TransferStatus.SENDING:
            self._fail(transfer, _ack_error(peer, ack), now)
        self._finish(transfer, now)
        self._pump(link, now)

    # ------------------------------------------------------------ endings

    def _fail(self, transfer: Transfer, error: KVRelayError, now: float) -> None:
        self._leave(transfer, _failed(transfer.attempt, error), now)

    def _leave(self, transfer: Transfer, final_message: Message, now: float) -> None:
        """Send nothing more of ``transfer``, and send ``final_message`` when nothing reads its blocks any more."""
        transfer.final_message = final_message
        if transfer.status is TransferStatus.PENDING:
            self.pending.remove(transfer.pending)
            self._end(transfer, now)
            return
        if transfer.status is TransferStatus.SENDING:
            link = self._links.get(transfer.peer)
            if link is not None:
                link.drop(transfer)
            transfer.lifecycle.move(TransferStatus.DRAINING, now)
        self._finish(transfer, now)

    def _finish(self, transfer: Transfer, now: float) -> None:
        """End ``transfer`` if all is written, or if it is draining and nothing reads its blocks any more."""
        if transfer.inflight or transfer.reading:
            return
        if transfer.status is TransferStatus.SENDING and transfer.is_written:
            transfer.final_message = TransferDone(
                request_id=transfer.attempt.request_id,
                epoch=transfer.attempt.epoch,
                num_bytes=transfer.num_bytes,
                link=self._links[transfer.peer].kind,
                layers=transfer.timeline(),
            )
            self._end(transfer, now)
        elif transfer.status is TransferStatus.DRAINING:
            self._end(transfer, now)

    def _end(self, transfer: Transfer, now: float) -> None:
        transfer.lifecycle.move(TransferStatus.ENDED, now)
        del self._transfers[transfer.attempt]
        link = self._links.get(transfer.peer)
        if link is not None:
            link.transfers.pop(transfer, None)
        if transfer.final_message is not None:
            self._answer(transfer.attempt, transfer.final_message)

    def _answer(self, attempt: Attempt, final_message: Message) -> None:
        """Tell the node how the attempt ended and remember it: signals may still come that were sent before."""
        self._counters["transfers_done"] += isinstance(final_message, TransferDone)
        self._counters["transfers_failed"] += isinstance(final_message, TransferFailed)
        self._ended.note(attempt, type(final_message))
        self._emit(Send(self._settings.node, final_message))

    # ------------------------------------------------------------ time

    def heard(self, peer: PeerId, now: float) -> None:
        """Note that ``peer`` sent something: any message counts as a heartbeat."""
        self._liveness.heard(peer, now)

    def beat(self, now: float) -> None:
        """Send a heartbeat on every link; give up silent peers and transfers without progress."""
        for peer in self._liveness.lost(now):
            self.peer_lost(peer, "no heartbeat", now)
        for transfer in list(self._transfers.values()):
            waits = transfer.inflight or (transfer.queue and self._may_send(transfer))
            if waits and now - transfer.busy_since_s >= self._settings.timeout_s:
                self._timed_out(transfer, now)
        for peer in self._links:
            self._emit(Send(peer, Heartbeat()))

    def _timed_out(self, transfer: Transfer, now: float) -> None:
        """Fail ``transfer``; if frames of it are under way their link goes too, or its blocks would not be safe."""
        error = TransferTimeoutError(f"no progress for {self._settings.timeout_s} s")
        if transfer.status is TransferStatus.SENDING:
            self._fail(transfer, error, now)
        link = self._links.get(transfer.peer)
        if transfer.inflight and link is not None:
            self._lose_link(link, error, now)

    def leave(self) -> None:
        """Drop every link; the process is about to end."""
        for peer in self._links:
            self._emit(Disconnect(peer))

    # ------------------------------------------------------------ looking in

    @property
    def inflight_bytes(self) -> int:
        """Bytes sent and not yet acknowledged, over all links."""
        return sum(link.inflight_bytes for link in self._links.values())

    @property
    def num_links(self) -> int:
        """Links that are open or being opened."""
        return len(self._links)

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless no transfer, signal or credit is held."""
        if self._transfers or self.pending.num_signals or self.pending.num_blocks or self.inflight_bytes:
            histories = {attempt: transfer.lifecycle.history for attempt, transfer in self._transfers.items()}
            raise LocalProtocolError(
                f"sender not quiescent: {histories}, {self.pending.num_signals} pending signals,"
                f" {self.inflight_bytes} bytes under way"
            )


def _failed(attempt: Attempt, error: KVRelayError) -> TransferFailed:
    return TransferFailed(request_id=attempt.request_id, epoch=attempt.epoch, error=ErrorInfo.of(error))


def _ack_error(peer: PeerId, ack: FrameAck) -> TransferError:
    where = f"layer {ack.layer} from block {ack.first_block}"
    if ack.status == "corrupt":
        return CorruptKVError(f"{where} reached {peer} corrupt")
    return TransferError(f"{peer} does not expect {where} ({ack.status})")
