"""The sending half of a messager, used on P: turns layer signals into frames."""

from __future__ import annotations

from collections.abc import Sequence

from cache_messager.block_mask import all_within
from cache_messager.counters import Counters
from cache_messager.frame_sender import FrameSender
from cache_messager.pending import PendingSignal
from cache_messager.sender_link import SenderLink
from cache_messager.sender_links import SenderLinks
from cache_messager.settings import MessagerSettings
from cache_messager.transfer import Transfer, TransferStatus
from cache_messager.transfers import Transfers, closed, failed
from cache_messager.work import FrameSent, MessagerOutbox
from kvrelay.errors import LocalProtocolError, TransferError, TransferTimeoutError
from kvrelay.machine.laws import Laws
from kvrelay.protocol.ids import Attempt, PeerId, node_of, peer_name
from kvrelay.protocol.messages.messager_to_messager import FrameAck, LinkAccepted, LinkOffer, LinkRefused
from kvrelay.protocol.messages.messager_to_node import TransferClosed
from kvrelay.protocol.messages.node_to_messager import CloseTransfer, KVSpan, OpenTransfer


class Sender:
    """All transfers out of this node's pool, and the links they share.

    It answers each OpenTransfer with one TransferDone or TransferFailed, unless a CloseTransfer comes first, and each
    CloseTransfer with one TransferClosed. A failure is also reported if the transfer is being closed. No answer is sent
    while the blocks may still be read.
    """

    def __init__(
        self,
        settings: MessagerSettings,
        host_id: str,
        offers: Sequence[LinkOffer],
        outbox: MessagerOutbox,
        counters: Counters,
    ) -> None:
        self._num_layers = settings.geometry.num_layers
        self._num_blocks = settings.pool.num_blocks
        self._timeout_s = settings.timeout_s
        self._outbox = outbox
        self._links: dict[PeerId, SenderLink] = {}
        self._transfers = Transfers(self._links, outbox, counters, settings.node)
        self._frames = FrameSender(
            self._transfers,
            self._links,
            outbox,
            counters,
            layer_block_bytes=settings.geometry.layer_block_bytes,
            layerwise=settings.layerwise,
        )
        self._link_table = SenderLinks(
            self._links,
            self._transfers,
            self._frames,
            outbox,
            counters,
            geometry=settings.geometry,
            host_id=host_id,
            offers=offers,
            peer_timeout_s=settings.peer_timeout_s,
        )

    # ------------------------------------------------------------ from the node

    def signal(self, layers: range, span: KVSpan) -> None:
        """Blocks are computed in ``layers``: queue them, or keep the signal until the transfer is opened."""
        attempt = Attempt(span.request_id, span.epoch)
        if self._transfers.ending(attempt) is not None:
            return  # sent before the node received the final message
        transfer = self._transfers.get_or_begin(attempt, self._num_layers)
        if transfer.status is TransferStatus.DRAINING:
            return
        problem = self._problem_with(layers, span)
        if problem is not None:
            self._transfers.fail(transfer, LocalProtocolError(problem))
        elif transfer.status is TransferStatus.PENDING:
            self._transfers.keep(transfer, PendingSignal(layers, span))
        else:
            self._frames.queue(transfer, layers, span)
            self._frames.pump(self._links[transfer.peer])

    def open(self, message: OpenTransfer) -> None:
        """D has reserved blocks: queue those signalled so far."""
        attempt = Attempt(message.request_id, message.epoch)
        ending = self._transfers.ending(attempt)
        if ending is TransferClosed:
            error = TransferError("the transfer was closed before it was opened")
            self._transfers.answer(attempt, failed(attempt, error))
        if ending is not None:
            return  # already answered
        transfer = self._transfers.get_or_begin(attempt, self._num_layers)
        if transfer.status is TransferStatus.PENDING:  # else repeated: the running transfer answers both
            self._begin(transfer, message)

    def _begin(self, transfer: Transfer, message: OpenTransfer) -> None:
        self._transfers.drop_pending(transfer)
        signals = transfer.open(message, self._outbox.now)
        try:
            link = self._link_table.link_to(message.link)
        except TransferError as error:
            self._transfers.fail(transfer, error)
            return
        link.transfers[transfer] = None
        for signal in signals:
            if transfer.status is TransferStatus.SENDING:
                self._frames.queue(transfer, signal.layers, signal.span)
        self._frames.pump(link)
        self._transfers.finish(transfer)

    def close(self, message: CloseTransfer) -> None:
        """The node closes the transfer: end it as soon as nothing reads its blocks."""
        attempt = Attempt(message.request_id, message.epoch)
        transfer = self._transfers.get(attempt)
        if transfer is None:
            self._transfers.answer(attempt, closed(attempt))
        else:
            self._transfers.leave(transfer, closed(attempt))

    def _problem_with(self, layers: range, span: KVSpan) -> str | None:
        """Return why a signal is invalid, or None."""
        if not 0 <= layers.start <= layers.stop <= self._num_layers:
            return f"layers {layers.start} to {layers.stop - 1} of {self._num_layers} were signalled"
        if not all_within(span.source_block_ids, self._num_blocks):
            return f"a block outside the pool of {self._num_blocks} was signalled"
        if not 0 <= span.first_block <= self._num_blocks:
            return f"block {span.first_block} of a request was signalled, the pool has {self._num_blocks}"
        return None

    # ------------------------------------------------------------ from links and from D's messagers

    def frame_sent(self, event: FrameSent) -> None:
        """A link has finished reading the blocks of a frame, or could not send it."""
        self._frames.sent(event)

    def acked(self, peer: PeerId, ack: FrameAck) -> None:
        """D's messager acknowledged a frame."""
        self._frames.acked(peer, ack)

    def accepted(self, peer: PeerId, message: LinkAccepted) -> None:
        """D's messager accepted the link."""
        self._link_table.accepted(peer, message)

    def refused(self, peer: PeerId, message: LinkRefused) -> None:
        """D's messager refused the link, or closed it."""
        self._link_table.refused(peer, message)

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer`` is lost."""
        self._link_table.peer_lost(peer, reason)

    def link_lost(self, peer: PeerId, reason: str) -> None:
        """A link cannot move bytes to ``peer`` any more."""
        self._link_table.link_lost(peer, reason)

    # ------------------------------------------------------------ time

    def record_message(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._link_table.record_message(peer)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: neither peers nor transfers are to blame for it."""
        self._link_table.resumed(paused_s)
        for transfer in self._transfers:
            transfer.busy_since_s += paused_s

    def beat(self) -> None:
        """Send a heartbeat on every link; drop links to silent peers and fail transfers without progress."""
        self._link_table.lose_silent()
        for transfer in self._transfers:
            overdue = self._outbox.now - transfer.busy_since_s >= self._timeout_s
            if overdue and self._frames.is_waiting(transfer):
                self._timed_out(transfer)
        self._link_table.beat()

    def _timed_out(self, transfer: Transfer) -> None:
        """Fail ``transfer``. If it has unacknowledged frames, drop the link, because its blocks may still be read."""
        error = TransferTimeoutError(f"no progress for {self._timeout_s} s")
        if transfer.status is TransferStatus.SENDING:
            self._transfers.fail(transfer, error)
        link = self._links.get(transfer.peer)
        if transfer.inflight and link is not None:
            self._link_table.lose(link, error)

    def leave(self) -> None:
        """Drop every link, before the process exits."""
        self._link_table.disconnect()

    # ------------------------------------------------------------ for metrics and tests

    @property
    def num_pending_signals(self) -> int:
        """Signals that wait for their transfer to be opened."""
        return self._transfers.num_pending_signals

    @property
    def inflight_bytes(self) -> int:
        """Bytes sent and not acknowledged, over all links."""
        return sum(link.inflight_bytes for link in self._links.values())

    @property
    def num_links(self) -> int:
        """Links that are open or being opened."""
        return len(self._links)

    def link_bytes_per_s(self) -> dict[str, float]:
        """Return the speed of each link that has moved bytes lately, by the name of the decode node."""
        speeds = {peer_name(node_of(peer)): link.speed.at(self._outbox.now) for peer, link in self._links.items()}
        return {name: speed for name, speed in speeds.items() if speed is not None}

    @property
    def activity(self) -> int | None:
        """Transfers since the start, or None if one is not over."""
        return None if len(self._transfers) else self._transfers.num_begun

    def laws_at_rest(self) -> Laws:
        """Check that no transfer, signal or credit is held; see ``kvrelay.machine.laws``."""
        yield from self._transfers.laws_at_rest()
        # In one part: a link may be lost between two parts.
        yield [violation for link in self._links.values() for violation in link.violations_at_rest()]
