"""D's half of the messager: frames in, blocks written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from cache_messager.block_mask import all_within
from cache_messager.counters import Counters
from cache_messager.expectation import Expectation, ExpectationStatus
from cache_messager.settings import MessagerSettings
from cache_messager.work import AcceptLink, BlocksWritten, DropLink, LinkReady, Work, WriteBlocks, violation
from kvrelay.errors import (
    GeometryMismatchError,
    KVRelayError,
    LocalProtocolError,
    PeerLostError,
    TransferError,
)
from kvrelay.machine.contract import CoreAction, Log, Send
from kvrelay.machine.liveness import Liveness
from kvrelay.machine.recent import Recent
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, Heartbeat, Message
from kvrelay.protocol.messages.messager_to_messager import FrameAck, KVFrame, LinkAccepted, LinkHello, LinkRefused
from kvrelay.protocol.messages.messager_to_node import KVArrived, KVCancelled, KVExpected, KVFailed
from kvrelay.protocol.messages.node_to_messager import CancelKV, ExpectKV

Emit = Callable[[CoreAction | Work], None]
"""Takes one action."""


class AckStatus(StrEnum):
    """What became of a frame."""

    WRITTEN = "written"
    STALE = "stale"
    CORRUPT = "corrupt"


@dataclass(slots=True)
class ReceiverLink:
    """The receiving end of a link. ``kind`` is None until one of the offers has been accepted."""

    link_id: int
    peer: PeerId
    hello: LinkHello
    kind: str | None = None
    unacked_bytes: int = 0


class Receiver:
    """All transfers into this node's pool, and the links they come by.

    What it owes its node: for each ExpectKV one KVExpected and then one KVArrived or KVFailed, unless a CancelKV comes
    first; for each CancelKV one KVCancelled; and none of them but KVExpected while a block may still be written. What
    it owes a sender: for each frame one FrameAck, but for copies of a frame that is being written.
    """

    def __init__(self, settings: MessagerSettings, emit: Emit, counters: Counters) -> None:
        self._settings = settings
        self._geometry = settings.geometry
        self._credit_bytes = max(settings.max_inflight_bytes, settings.geometry.layer_block_bytes)
        self._emit = emit
        self._counters = counters
        self._expectations: dict[Attempt, Expectation] = {}
        self._arrived: Recent[bool] = Recent()
        self._links: dict[PeerId, ReceiverLink] = {}
        self._links_by_id: dict[int, ReceiverLink] = {}
        self._last_link_id = 0
        self._liveness = Liveness(settings.peer_timeout_s)

    # ------------------------------------------------------------ from the node

    def expect(self, message: ExpectKV, now: float) -> None:
        """Take frames for these blocks from now on."""
        attempt = Attempt(message.request_id, message.epoch)
        if attempt in self._expectations:
            return  # said twice: what follows answers both
        blocks, num_blocks = message.target_block_ids, self._settings.pool.num_blocks
        self._arrived.forget(attempt)
        expectation = self._expectations[attempt] = Expectation(message, self._geometry.num_layers, now)
        self._tell(KVExpected(request_id=message.request_id, epoch=message.epoch))
        if not all_within(blocks, num_blocks) or not 0 <= message.first_block <= num_blocks:
            self._fail(expectation, LocalProtocolError(f"blocks outside the pool of {num_blocks} are expected"), now)
            return
        self._finish(expectation, now)

    def cancel(self, message: CancelKV, now: float) -> None:
        """Let nothing more into the blocks."""
        attempt = Attempt(message.request_id, message.epoch)
        cancelled = KVCancelled(request_id=message.request_id, epoch=message.epoch)
        self._arrived.forget(attempt)
        expectation = self._expectations.get(attempt)
        if expectation is None:
            self._tell(cancelled)
        else:
            self._leave(expectation, cancelled, now)

    # ------------------------------------------------------------ links

    def hello(self, peer: PeerId, message: LinkHello, now: float) -> None:
        """A sender opens a link, or says so again."""
        known = self._links.get(peer)
        if known is not None and known.hello == message:
            if known.kind is not None:
                self._tell_accepted(known, known.kind)
            return
        if known is not None:
            self._drop_link(known, PeerLostError(f"{peer} opened its link anew"), now)
        differences = self._geometry.differences(message.geometry)
        if differences:
            self._refuse(peer, "; ".join(differences), GeometryMismatchError.code)
            return
        self._last_link_id += 1
        link = ReceiverLink(self._last_link_id, peer, message)
        self._links[peer] = self._links_by_id[link.link_id] = link
        self._liveness.watch(peer, now)
        self._emit(AcceptLink(link.link_id, message.offers))

    def link_ready(self, event: LinkReady, now: float) -> None:
        """The service accepted one of the offers, or none."""
        link = self._links_by_id.get(event.link_id)
        if link is None:
            self._release(event.link_id, event.kind)
        elif event.kind is None:
            reason = f"none of the links offered is possible: {event.reason}"
            self._refuse(link.peer, reason, TransferError.code)
            self._drop_link(link, TransferError(reason), now)
        else:
            link.kind = event.kind
            self._tell_accepted(link, event.kind)

    def peer_lost(self, peer: PeerId, reason: str, now: float) -> None:
        """Nothing comes from ``peer`` any more."""
        link = self._links.get(peer)
        if link is not None:
            self._emit(Log("warning", "sender lost", {"peer": peer, "reason": reason}))
            self._drop_link(link, PeerLostError(f"{peer} is lost: {reason}"), now)

    def _tell_accepted(self, link: ReceiverLink, kind: str) -> None:
        self._emit(Send(link.peer, LinkAccepted(kind=kind, credit_bytes=self._credit_bytes)))

    def _refuse(self, peer: PeerId, reason: str, code: str) -> None:
        self._counters["links_refused"] += 1
        self._emit(Log("warning", "link refused", {"peer": peer, "reason": reason}))
        self._emit(Send(peer, LinkRefused(reason=reason, code=code)))

    def _drop_link(self, link: ReceiverLink, error: TransferError, now: float) -> None:
        """Forget ``link`` and fail what came by it."""
        del self._links[link.peer], self._links_by_id[link.link_id]
        self._liveness.forget(link.peer)
        self._counters["links_lost"] += 1
        for expectation in list(self._expectations.values()):
            if expectation.link_id == link.link_id and expectation.status is ExpectationStatus.RECEIVING:
                self._fail(expectation, error, now)
        self._release(link.link_id, link.kind)

    def _release(self, link_id: int, kind: str | None) -> None:
        if kind is not None:
            self._emit(DropLink(link_id))

    # ------------------------------------------------------------ frames

    def frame(self, peer: PeerId, frame: KVFrame, payload: tuple[memoryview, ...], now: float) -> None:
        """Write the frame's blocks if they are expected and were not written before."""
        link = self._links.get(peer)
        attempt = Attempt(frame.request_id, frame.epoch)
        expectation = self._expectations.get(attempt)
        if link is None or link.kind is None:
            self._refuse(peer, "frames need an accepted link", TransferError.code)
        elif self._arrived.get(attempt):
            self._counters["duplicate_frames"] += 1
            self._ack(peer, frame, AckStatus.WRITTEN)
        elif expectation is None or expectation.status is not ExpectationStatus.RECEIVING:
            self._counters["stale_frames"] += 1
            self._ack(peer, frame, AckStatus.STALE)
        else:
            self._take(link, expectation, frame, payload, now)

    def _take(
        self,
        link: ReceiverLink,
        expectation: Expectation,
        frame: KVFrame,
        payload: tuple[memoryview, ...],
        now: float,
    ) -> None:
        problem = expectation.problem_with(frame, self._geometry) or self._beyond_credit(link, frame)
        if problem is not None:
            self._counters["corrupt_frames"] += 1
            self._ack(link.peer, frame, AckStatus.CORRUPT)
            self._fail(expectation, violation(link.peer, problem), now)
        elif expectation.is_claimed(frame):
            self._counters["duplicate_frames"] += 1
            if expectation.has_written(frame):
                self._ack(link.peer, frame, AckStatus.WRITTEN)
        else:
            expectation.link_id = link.link_id
            expectation.claim(frame)
            link.unacked_bytes += frame.num_bytes
            self._emit(WriteBlocks(link.link_id, frame, payload))

    def _beyond_credit(self, link: ReceiverLink, frame: KVFrame) -> str | None:
        """Return what is wrong if ``frame`` exceeds the sender's credit, or None."""
        if link.unacked_bytes + frame.num_bytes > self._credit_bytes:
            return f"more than {self._credit_bytes} bytes under way"
        return None

    def blocks_written(self, event: BlocksWritten, now: float) -> None:
        """A write is over: acknowledge it, and tell the node if that was the last, or if it went wrong."""
        frame, link = event.frame, self._links_by_id.get(event.link_id)
        status = AckStatus.WRITTEN if event.error is None else AckStatus.CORRUPT
        self._counters["frames_written" if event.error is None else "corrupt_frames"] += 1
        self._counters["bytes_written"] += frame.num_bytes if event.error is None else 0
        if link is not None:
            link.unacked_bytes -= frame.num_bytes
            self._ack(link.peer, frame, status)
        expectation = self._expectations[Attempt(frame.request_id, frame.epoch)]
        expectation.num_writing -= 1
        if event.error is None:
            expectation.wrote(frame)
        elif expectation.status is ExpectationStatus.RECEIVING:
            self._fail(expectation, event.error, now)
        self._finish(expectation, now)

    def _ack(self, peer: PeerId, frame: KVFrame, status: AckStatus) -> None:
        ack = FrameAck(
            request_id=frame.request_id,
            epoch=frame.epoch,
            layer=frame.layer,
            first_block=frame.first_block,
            num_bytes=frame.num_bytes,
            status=status.value,
        )
        self._emit(Send(peer, ack))

    # ------------------------------------------------------------ endings

    def _fail(self, expectation: Expectation, error: KVRelayError, now: float) -> None:
        request_id, epoch = expectation.attempt
        self._leave(expectation, KVFailed(request_id=request_id, epoch=epoch, error=ErrorInfo.of(error)), now)

    def _leave(self, expectation: Expectation, final_message: Message, now: float) -> None:
        """Write nothing more, and send ``final_message`` when no write is under way any more."""
        expectation.final_message = final_message
        if expectation.status is ExpectationStatus.RECEIVING:
            expectation.lifecycle.move(ExpectationStatus.DRAINING, now)
        self._finish(expectation, now)

    def _finish(self, expectation: Expectation, now: float) -> None:
        """End ``expectation`` if all is written, or if it is draining and nothing is being written."""
        if expectation.num_writing or expectation.status is ExpectationStatus.ENDED:
            return
        request_id, epoch = expectation.attempt
        if expectation.status is ExpectationStatus.RECEIVING:
            if not expectation.is_written:
                return
            expectation.final_message = KVArrived(request_id=request_id, epoch=epoch, num_bytes=expectation.num_bytes)
            self._arrived.note(expectation.attempt, True)
        expectation.lifecycle.move(ExpectationStatus.ENDED, now)
        del self._expectations[expectation.attempt]
        if expectation.final_message is not None:
            self._tell(expectation.final_message)

    def _tell(self, message: Message) -> None:
        self._emit(Send(self._settings.node, message))

    # ------------------------------------------------------------ time

    def heard(self, peer: PeerId, now: float) -> None:
        """Note that ``peer`` sent something: any message counts as a heartbeat."""
        self._liveness.heard(peer, now)

    def beat(self, now: float) -> None:
        """Send a heartbeat on every link; give up silent senders."""
        for peer in self._liveness.lost(now):
            self.peer_lost(peer, "no heartbeat", now)
        for peer in self._links:
            self._emit(Send(peer, Heartbeat()))

    def leave(self) -> None:
        """Tell every sender that nothing is taken any more; the process is about to end."""
        for link in self._links.values():
            self._emit(Send(link.peer, LinkRefused(reason="its node is leaving")))
            self._release(link.link_id, link.kind)

    # ------------------------------------------------------------ looking in

    @property
    def num_links(self) -> int:
        """Links that senders have opened."""
        return len(self._links)

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError unless nothing is expected and nothing is being written."""
        unacked_bytes = sum(link.unacked_bytes for link in self._links.values())
        if self._expectations or unacked_bytes:
            histories = {attempt: expectation.lifecycle.history for attempt, expectation in self._expectations.items()}
            raise LocalProtocolError(f"receiver not quiescent: {histories}, {unacked_bytes} bytes being written")
