"""The receiving half of a messager, used on D: writes incoming frames to the pool."""

from __future__ import annotations

from cache_messager.counters import Counters
from cache_messager.expectation import Expectation, ExpectationStatus
from cache_messager.expectations import Expectations
from cache_messager.receiver_links import ReceiverLink, ReceiverLinks
from cache_messager.settings import MessagerSettings
from cache_messager.work import BlocksWritten, LinkReady, MessagerOutbox, WriteBlocks, violation
from kvrelay.machine.laws import Laws, Violation
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.messager_to_messager import AckStatus, FrameAck, KVFrame, LinkHello
from kvrelay.protocol.messages.node_to_messager import CancelKV, ExpectKV


class Receiver:
    """All transfers into this node's pool, and their links.

    It answers each ExpectKV with one KVExpected and then one KVArrived or KVFailed, unless a CancelKV comes first, and
    each CancelKV with one KVCancelled. Except for KVExpected, no answer is sent while a block may still be written. It
    answers each frame with one FrameAck, except for duplicates of a frame that is being written.
    """

    def __init__(self, settings: MessagerSettings, outbox: MessagerOutbox, counters: Counters) -> None:
        self._geometry = settings.geometry
        self._credit_bytes = max(settings.max_inflight_bytes, settings.geometry.layer_block_bytes)
        self._outbox = outbox
        self._counters = counters
        self._expectations = Expectations(
            outbox, settings.node, num_layers=settings.geometry.num_layers, num_blocks=settings.pool.num_blocks
        )
        self._links = ReceiverLinks(
            self._expectations,
            outbox,
            counters,
            geometry=settings.geometry,
            credit_bytes=self._credit_bytes,
            peer_timeout_s=settings.peer_timeout_s,
        )

    # ------------------------------------------------------------ from the node

    def expect(self, message: ExpectKV) -> None:
        """Accept frames for these blocks from now on."""
        self._expectations.expect(message)

    def cancel(self, message: CancelKV) -> None:
        """Start no further writes to the blocks; send KVCancelled when none is in progress."""
        self._expectations.cancel(message)

    # ------------------------------------------------------------ links

    def hello(self, peer: PeerId, message: LinkHello) -> None:
        """A sender opens a link, or repeats its LinkHello."""
        self._links.hello(peer, message)

    def link_ready(self, event: LinkReady) -> None:
        """The service accepted one of a sender's offers, or none."""
        self._links.ready(event)

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer`` is lost."""
        self._links.peer_lost(peer, reason)

    # ------------------------------------------------------------ frames

    def frame(self, peer: PeerId, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Write the frame's blocks if they are expected and were not written before."""
        link = self._links.get(peer)
        attempt = Attempt(frame.request_id, frame.epoch)
        expectation = self._expectations.get(attempt)
        if link is None or link.accepted is None:
            self._links.refuse(peer, "frames need an accepted link")
        elif self._expectations.has_arrived(attempt):
            self._counters["duplicate_frames"] += 1
            self._ack(peer, frame, AckStatus.WRITTEN)
        elif (
            expectation is None
            or expectation.status is not ExpectationStatus.RECEIVING
            or expectation.message.sender not in (None, peer)
        ):
            self._counters["stale_frames"] += 1
            self._ack(peer, frame, AckStatus.STALE)
        else:
            self._take(link, expectation, frame, payload)

    def _take(
        self, link: ReceiverLink, expectation: Expectation, frame: KVFrame, payload: tuple[memoryview, ...]
    ) -> None:
        problem = expectation.problem_with(frame, self._geometry) or self._beyond_credit(link, frame)
        if problem is not None:
            self._counters["corrupt_frames"] += 1
            self._ack(link.peer, frame, AckStatus.CORRUPT)
            self._expectations.fail(expectation, violation(link.peer, problem))
        elif expectation.is_claimed(frame):
            self._counters["duplicate_frames"] += 1
            if expectation.has_written(frame):
                self._ack(link.peer, frame, AckStatus.WRITTEN)
        else:
            expectation.link_id = link.link_id
            expectation.claim(frame)
            link.unacked_bytes += frame.num_bytes
            self._outbox.do(WriteBlocks(link.link_id, frame, payload))

    def _beyond_credit(self, link: ReceiverLink, frame: KVFrame) -> str | None:
        """Return the problem if ``frame`` exceeds the sender's credit, or None."""
        if link.unacked_bytes + frame.num_bytes > self._credit_bytes:
            return f"more than {self._credit_bytes} bytes under way"
        return None

    def blocks_written(self, event: BlocksWritten) -> None:
        """A write has ended: acknowledge the frame; end the expectation if it was the last write or failed."""
        frame, link = event.frame, self._links.get_by_id(event.link_id)
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
            self._expectations.fail(expectation, event.error)
        self._expectations.finish(expectation)

    def _ack(self, peer: PeerId, frame: KVFrame, status: AckStatus) -> None:
        ack = FrameAck(
            request_id=frame.request_id,
            epoch=frame.epoch,
            layer=frame.layer,
            first_block=frame.first_block,
            num_bytes=frame.num_bytes,
            status=status,
        )
        self._outbox.send(peer, ack)

    # ------------------------------------------------------------ time

    def record_message(self, peer: PeerId) -> None:
        """Record a message from ``peer``: any message counts as a heartbeat."""
        self._links.record_message(peer)

    def resumed(self, paused_s: float) -> None:
        """This process did not run for ``paused_s``: no sender is to blame for its silence."""
        self._links.resumed(paused_s)

    def beat(self) -> None:
        """Send a heartbeat on every link; drop the links of silent senders."""
        self._links.beat()

    def leave(self) -> None:
        """Refuse further frames of every sender, before the process exits."""
        self._links.leave()

    # ------------------------------------------------------------ for metrics and tests

    @property
    def num_links(self) -> int:
        """Links that senders have opened."""
        return len(self._links)

    @property
    def activity(self) -> int | None:
        """Expectations since the start, or None if one is not over."""
        return None if len(self._expectations) else self._expectations.num_begun

    def laws_at_rest(self) -> Laws:
        """Check that no expectation or write is held; see ``kvrelay.machine.laws``."""
        yield from self._expectations.laws_at_rest()
        if self._links.unacked_bytes:
            yield [Violation(f"receiver not quiescent: {self._links.unacked_bytes} bytes being written")]
