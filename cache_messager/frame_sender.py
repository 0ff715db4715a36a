"""Frames of P's messager: sent round-robin within each link's credit, acknowledged by D's messager."""

from __future__ import annotations

from collections.abc import Mapping

from cache_messager.counters import Counters
from cache_messager.sender_link import SenderLink
from cache_messager.transfer import FrameKey, Transfer, TransferStatus
from cache_messager.transfers import Transfers
from cache_messager.work import FrameSent, MessagerOutbox, SendFrame
from kvrelay.errors import CorruptKVError, LocalProtocolError, TransferError
from kvrelay.protocol.ids import Attempt, PeerId, peer_name
from kvrelay.protocol.messages.messager_to_messager import AckStatus, FrameAck
from kvrelay.protocol.messages.node_to_messager import KVSpan


class FrameSender:
    """Sends queued blocks: with ``layerwise`` at once, else when all blocks of the transfer are queued."""

    def __init__(
        self,
        transfers: Transfers,
        links: Mapping[PeerId, SenderLink],
        outbox: MessagerOutbox,
        counters: Counters,
        *,
        layer_block_bytes: int,
        layerwise: bool,
    ) -> None:
        self._transfers = transfers
        self._links = links
        self._outbox = outbox
        self._counters = counters
        self._block_bytes = layer_block_bytes
        self._layerwise = layerwise

    def queue(self, transfer: Transfer, layers: range, span: KVSpan) -> None:
        """Queue blocks computed in ``layers``; fail the transfer if D has not reserved them all."""
        try:
            for layer in layers:
                transfer.signal(layer, span, self._outbox.now)
        except LocalProtocolError as error:
            self._transfers.fail(transfer, error)
            return
        if self._may_send(transfer):
            self._links[transfer.peer].enqueue(transfer)

    def is_waiting(self, transfer: Transfer) -> bool:
        """Return whether ``transfer`` waits for its peer: for an acknowledgement, or for credit."""
        return bool(transfer.inflight or (transfer.queue and self._may_send(transfer)))

    def _may_send(self, transfer: Transfer) -> bool:
        return self._layerwise or transfer.is_signalled

    def pump(self, link: SenderLink) -> None:
        """Send as much as the credit allows, one frame per transfer in turn."""
        max_blocks = link.blocks_per_frame(self._block_bytes)
        while link.ready:
            transfer = link.ready[0]
            num_bytes = min(max_blocks, len(transfer.queue[0].block_ids)) * self._block_bytes
            if not link.has_room(num_bytes):
                return
            link.ready.popleft()
            self._send(link, transfer, min(max_blocks, link.room_bytes // self._block_bytes))
            link.enqueue(transfer)

    def _send(self, link: SenderLink, transfer: Transfer, max_blocks: int) -> None:
        blocks = transfer.next_frame(max_blocks)
        num_bytes = blocks.num_blocks * self._block_bytes
        frame = transfer.send(blocks, num_bytes, slot=link.take(num_bytes, self._outbox.now), now=self._outbox.now)
        self._counters["frames_sent"] += 1
        self._counters["bytes_sent"] += num_bytes
        self._outbox.do(SendFrame(link.peer, link.kind, frame, blocks.block_ids))

    def sent(self, event: FrameSent) -> None:
        """The link has finished reading the blocks of a frame, or could not send it: then the transfer fails."""
        transfer = self._transfers[Attempt(event.frame.request_id, event.frame.epoch)]
        key = FrameKey.of(event.frame)
        transfer.reading.remove(key)
        link = self._links.get(transfer.peer)
        if event.error is not None:
            frame = transfer.inflight.pop(key, None)
            if link is not None and frame is not None:
                link.give_back(frame)
            if transfer.status is TransferStatus.SENDING:
                self._transfers.fail(transfer, event.error)
        self._transfers.finish(transfer)
        if link is not None:
            self.pump(link)

    def acked(self, peer: PeerId, ack: FrameAck) -> None:
        """Handle an acknowledgement: return the credit; record the frame as written, or fail the transfer."""
        link = self._links.get(peer)
        transfer = self._transfers.get(Attempt(ack.request_id, ack.epoch))
        frame = None
        if link is not None and transfer is not None and transfer.peer == peer:
            frame = transfer.inflight.pop(FrameKey.of(ack), None)
        if link is None or transfer is None or frame is None:
            self._counters["unexpected_acks"] += 1
            return
        link.give_back(frame)
        if ack.status is AckStatus.WRITTEN:
            link.written(frame, self._outbox.now)
            transfer.written(frame, self._outbox.now)
        elif transfer.status is TransferStatus.SENDING or ack.status is AckStatus.CORRUPT:
            self._transfers.fail(transfer, _ack_error(peer, ack))
        self._transfers.finish(transfer)
        self.pump(link)


def _ack_error(peer: PeerId, ack: FrameAck) -> TransferError:
    where = f"layer {ack.layer} from block {ack.first_block}"
    if ack.status is AckStatus.CORRUPT:
        return CorruptKVError(f"{where} reached {peer_name(peer)} corrupt")
    return TransferError(f"{peer_name(peer)} does not expect {where} ({ack.status})")
