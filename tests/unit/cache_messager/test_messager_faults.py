"""What goes wrong between two messagers: lost, doubled, late and damaged frames, dead peers, every order of events."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest
from messager_pair import BLOCK_BYTES, D_NODE, GEOMETRY, P_NODE, SERVICE, D, P, Pair, one_of_each
from support.ids import block_ids

from cache_messager.links import link_class
from cache_messager.work import FrameSent, LinkLost, SendFrame
from kvrelay.errors import TransferError
from kvrelay.machine.contract import PeerLost, Received, Send, TimerFired
from kvrelay.protocol.ids import Attempt, BlockId, PeerId, RequestId
from kvrelay.protocol.messages.base import Heartbeat, LinkAddress, Message
from kvrelay.protocol.messages.messager_to_messager import (
    AckStatus,
    FrameAck,
    KVFrame,
    LinkAccepted,
    LinkHello,
    LinkOffer,
    LinkRefused,
)
from kvrelay.protocol.messages.messager_to_node import KVFailed, MessagerStats, TransferFailed
from kvrelay.protocol.messages.node_to_messager import ExpectKV, KVSpan, LayerSignal, OpenTransfer
from kvrelay.protocol.messages.node_to_router import Leaving

A = Attempt(RequestId("a"), 1)

pytestmark = pytest.mark.usefixtures("pair_pools")


def started(pair: Pair, attempt: Attempt = A, num_blocks: int = 4) -> tuple[list[BlockId], list[BlockId]]:
    """Open a transfer on a link that is up, with nothing sent yet."""
    sources, targets = one_of_each(pair, attempt, num_blocks)
    pair.open(attempt, targets)
    pair.run()
    return sources, targets


def failure(pair: Pair, me: str = P) -> TransferFailed | KVFailed:
    """Return the one failure the node was told."""
    (failed,) = pair.told(PeerId(me), TransferFailed, KVFailed)
    assert isinstance(failed, TransferFailed | KVFailed)
    return failed


def received(pair: Pair, kind: type[Message]) -> list[Message]:
    return [message for message in pair.moved if isinstance(message, kind)]


# ---------------------------------------------------------------- frames


def test_lost_frame_ends_in_a_timeout_and_nothing_reads_the_blocks_afterwards() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.on_wire = lambda _src, _dst, message: (
            [] if isinstance(message, KVFrame) and message.layer == 1 else [message]
        )
        pair.signal_all(A, sources)
        pair.run()
        assert pair.endings(P, A) == []
        pair.advance(61)
        assert failure(pair).error.code == "transfer_timeout"
        assert not pair.connections, "frames may still be queued on the link"
        pair.cancel(A)
        pair.run()
        pair.assert_quiescent()


def test_progress_puts_the_timeout_off() -> None:
    with Pair(timeout_s=3.0, d={"max_inflight_bytes": BLOCK_BYTES}) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        for _ in range(12):  # one frame each 2 s, and always more to send
            pair.now += 2
            pair.feed(P, TimerFired("heartbeat"))
            for channel in ((SERVICE, P), (P, D), (SERVICE, D), (D, P)):
                pair.run([channel])
        assert pair.endings(P, A) == ["TransferDone"]


def test_waiting_for_the_own_node_is_no_lack_of_progress() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run()
        pair.advance(100)
        pair.signal(A, 1, 0, sources)
        pair.run([(P_NODE, P)])
        pair.feed(P, TimerFired("heartbeat"))
        assert pair.endings(P, A) == []


@pytest.mark.parametrize("link", ["shm", "ipc"])
def test_doubled_frames_are_written_once(link: str) -> None:
    with Pair(links=(link,)) as pair:
        pair.on_wire = lambda _src, _dst, message: [message] * (2 if isinstance(message, KVFrame) else 1)
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run()
        assert pair.counter(D, "duplicate_frames") == 3
        assert pair.endings(P, A) == ["TransferDone"]
        assert pair.endings(D, A) == ["KVArrived"]
        pair.assert_moved(A)
        pair.assert_quiescent()


@pytest.mark.parametrize("seed", range(10))
def test_everything_doubled_on_the_wire_changes_nothing(seed: int) -> None:
    with Pair(seed) as pair:
        pair.on_wire = lambda _src, _dst, message: [message, message]
        for name in "ab":
            attempt = Attempt(RequestId(name), 1)
            blocks = block_ids(*(range(16) if name == "a" else range(16, 40)))
            pair.expect(attempt, blocks)
            pair.run([(D_NODE, D)])
            pair.signal_all(attempt, blocks)
            pair.open(attempt, blocks)
        pair.run()
        for attempt in (Attempt(RequestId("a"), 1), Attempt(RequestId("b"), 1)):
            assert pair.endings(P, attempt) == ["TransferDone"]
            assert pair.endings(D, attempt) == ["KVArrived"]
            pair.assert_moved(attempt)
        pair.assert_quiescent()


def test_corrupt_payload_fails_both_ends_and_writes_nothing() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, targets = started(pair)
        pair.corrupt_payload = True
        pair.signal(A, 0, 0, sources)
        pair.run()
        assert failure(pair).error.code == failure(pair, D).error.code == "corrupt_kv"
        assert failure(pair).error.retryable
        assert pair.counter(D, "corrupt_frames") == 1
        assert not pair.ends[D].pool.planes[:, :, targets].any()
        pair.assert_quiescent()


def test_blocks_changed_under_a_reader_are_a_failure_and_never_kv() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run([(P_NODE, P)])
        pair.ends[P].pool.planes[0, 0, sources[0]] ^= 1
        pair.run()
        assert failure(pair, D).error.code == "corrupt_kv"


@pytest.mark.fault("F14")
def test_frame_of_an_earlier_epoch_does_not_touch_the_slot_it_aimed_at() -> None:
    with Pair(links=("ipc",)) as pair:
        old, new = Attempt(RequestId("a"), 1), Attempt(RequestId("a"), 2)
        sources, targets = started(pair, old)
        pair.signal_all(old, sources)
        pair.run([(P_NODE, P)])  # frames under way
        pair.cancel(old)
        pair.run([(D_NODE, D)])
        assert pair.endings(D, old) == ["KVCancelled"]
        pair.expect(new, targets)
        pair.run()
        assert pair.counter(D, "stale_frames") == 3
        assert failure(pair).epoch == 1
        assert not pair.ends[D].pool.planes.any()
        pair.ends[P].pool.planes[:] = pair.original
        pair.signal_all(new, sources)
        pair.open(new, targets)
        pair.run()
        assert pair.endings(P, new) == ["TransferDone"]
        pair.assert_moved(new)


def test_failure_waits_until_no_frame_is_under_way() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        stale = FrameAck(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            num_bytes=4 * BLOCK_BYTES,
            status=AckStatus.STALE,
        )
        pair.feed(P, Received(D, stale))
        assert pair.endings(P, A) == [], "two frames of it may still be read"
        pair.run()
        assert pair.endings(P, A) == ["TransferFailed"]


def test_signals_of_a_failing_transfer_send_nothing_more() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources[:2])
        pair.signal(A, 1, 0, sources)
        pair.run([(P_NODE, P)])
        stale = FrameAck(
            request_id=RequestId("a"),
            epoch=1,
            layer=1,
            first_block=0,
            num_bytes=4 * BLOCK_BYTES,
            status=AckStatus.STALE,
        )
        pair.feed(P, Received(D, stale))
        pair.signal(A, 0, 2, sources)
        pair.run([(P_NODE, P)])
        pair.run()
        assert len(pair.frames) == 2
        assert pair.endings(P, A) == ["TransferFailed"]


def test_acknowledgement_by_another_decode_node_counts_for_nothing() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run([(P_NODE, P)])
        other = LinkAddress(peer=PeerId("d1.messager#1"), host_id="host", tcp="tcp://d1", ipc="ipc://d1")
        pair.say(
            P,
            OpenTransfer(request_id=RequestId("b"), epoch=1, link=other, first_block=0, target_block_ids=block_ids(1)),
        )
        pair.run([(P_NODE, P)])
        ack = FrameAck(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            num_bytes=4 * BLOCK_BYTES,
            status=AckStatus.WRITTEN,
        )
        pair.feed(P, Received(other.peer, ack))
        assert pair.counter(P, "unexpected_acks") == 1
        assert pair.ends[P].machine.gauges()["inflight_bytes"] == 4 * BLOCK_BYTES


def test_acknowledgements_of_nothing_are_counted() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        ack = FrameAck(
            request_id=RequestId("a"), epoch=1, layer=0, first_block=0, num_bytes=1, status=AckStatus.WRITTEN
        )
        pair.feed(P, Received(D, ack))
        pair.feed(P, Received(PeerId("x#1"), msgspec.structs.replace(ack, request_id="b")))
        assert pair.counter(P, "unexpected_acks") == 2
        pair.signal_all(A, sources)
        pair.run()
        pair.assert_moved(A)


BAD_FRAMES: dict[str, dict[str, object]] = {
    "layer beyond the last": {"layer": 3},
    "negative layer": {"layer": -1},
    "blocks of another place": {"first_block": 1},
    "place beyond the last": {"first_block": 1 << 60},
    "negative place": {"first_block": -1},
    "no blocks": {"target_block_ids": [], "source_block_ids": [], "num_bytes": 0},
    "fewer bytes": {"num_bytes": 4 * BLOCK_BYTES - 1},
    "no layer": {"num_layers": 0, "num_bytes": 0},
    "layers beyond the last": {"num_layers": 4, "num_bytes": 16 * BLOCK_BYTES},
    "bytes of one layer for two": {"num_layers": 2},
    "source outside the pool": {"source_block_ids": [0, 1, 2, 64]},
    "negative source": {"source_block_ids": [0, 1, 2, -1]},
    "fewer sources": {"source_block_ids": [0, 1, 2]},
}


@pytest.mark.parametrize("change", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_frame_that_breaks_the_protocol_is_refused_and_fails_the_expectation(change: dict[str, object]) -> None:
    with Pair() as pair:
        _, targets = started(pair)
        good = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            target_block_ids=targets,
            source_block_ids=block_ids(0, 1, 2, 3),
            num_bytes=4 * BLOCK_BYTES,
            digest=0,
        )
        pair.feed(D, Received(P, msgspec.structs.replace(good, **change)))
        pair.run()
        assert "broke the protocol" in failure(pair, D).error.message
        assert [ack.status for ack in received(pair, FrameAck)] == ["corrupt"]  # type: ignore[attr-defined]
        assert not pair.ends[D].pool.planes.any()


@pytest.mark.parametrize(("first_block", "num_blocks"), [(-4, 3), (0, 4)], ids=["wraps around", "overlaps"])
def test_frame_that_aims_beside_the_free_blocks_is_refused(first_block: int, num_blocks: int) -> None:
    with Pair() as pair:
        sources, targets = started(pair)
        pair.signal(A, 0, 0, sources[:2])
        pair.run()
        frame = msgspec.structs.replace(
            pair.frames[0],
            first_block=first_block,
            target_block_ids=targets[:num_blocks],
            source_block_ids=sources[:num_blocks],
            num_bytes=num_blocks * BLOCK_BYTES,
        )
        pair.feed(D, Received(P, frame))
        assert "broke the protocol" in failure(pair, D).error.message


def test_frame_with_a_layer_that_came_before_is_refused() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 1, 0, sources)
        pair.run()
        frame = msgspec.structs.replace(pair.frames[0], layer=0, num_layers=2, num_bytes=8 * BLOCK_BYTES)
        pair.feed(D, Received(P, frame))
        assert "came before" in failure(pair, D).error.message


def test_blocks_outside_the_own_reservation_cannot_be_written() -> None:
    with Pair() as pair:
        _, targets = started(pair)
        frame = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            target_block_ids=block_ids(*targets[:3], 63),
            source_block_ids=block_ids(0, 1, 2, 3),
            num_bytes=4 * BLOCK_BYTES,
            digest=0,
        )
        pair.feed(D, Received(P, frame))
        pair.run()
        assert "not those reserved" in failure(pair, D).error.message


@pytest.mark.parametrize("payload", [(), (memoryview(bytes(4 * BLOCK_BYTES + 1)),)])
def test_payload_of_another_length_is_refused(payload: tuple[memoryview, ...]) -> None:
    with Pair(links=("ipc",)) as pair:
        _, targets = started(pair)
        frame = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            target_block_ids=targets,
            source_block_ids=[],
            num_bytes=4 * BLOCK_BYTES,
            digest=0,
        )
        pair.feed(D, Received(P, frame, payload))
        pair.run()
        assert "bytes of payload" in failure(pair, D).error.message


@pytest.mark.fault("F12")
def test_receiver_takes_no_more_than_its_credit() -> None:
    with Pair(d={"max_inflight_bytes": 2 * BLOCK_BYTES}) as pair:
        _, targets = started(pair)
        for place in range(3):
            frame = KVFrame(
                request_id=RequestId("a"),
                epoch=1,
                layer=0,
                first_block=place,
                target_block_ids=[targets[place]],
                source_block_ids=block_ids(place),
                num_bytes=BLOCK_BYTES,
                digest=0,
            )
            pair.feed(D, Received(P, frame))
        assert pair.endings(D, A) == [], "two blocks are still being written"
        pair.run()
        assert "under way" in failure(pair, D).error.message


def test_signal_beyond_the_reserved_blocks_is_a_failure_and_no_silent_gap() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.open(A, targets[:3])
        pair.signal_all(A, sources)
        pair.run()
        assert "reserved none" in failure(pair).error.message


@pytest.mark.parametrize(
    "signal",
    [
        LayerSignal(step=1, layer=3, spans=[KVSpan(RequestId("a"), 1, 0, block_ids(1))]),
        LayerSignal(step=1, layer=1, num_layers=3, spans=[KVSpan(RequestId("a"), 1, 0, block_ids(1))]),
        LayerSignal(step=1, layer=1, num_layers=-1, spans=[KVSpan(RequestId("a"), 1, 0, block_ids(1))]),
        LayerSignal(step=1, layer=0, spans=[KVSpan(RequestId("a"), 1, 0, block_ids(64))]),
        LayerSignal(step=1, layer=0, spans=[KVSpan(RequestId("a"), 1, 1 << 60, block_ids(1))]),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_impossible_signal_is_a_failure(signal: LayerSignal, is_open: bool) -> None:
    with Pair() as pair:
        if is_open:
            started(pair)
        pair.say(P, signal)
        pair.run()
        assert failure(pair).error.code == "protocol_error"


@pytest.mark.parametrize("change", [{"target_block_ids": [1, 64]}, {"first_block": -1}, {"first_block": 1 << 60}])
def test_impossible_expectation_is_a_failure(change: dict[str, object]) -> None:
    with Pair() as pair:
        expect = ExpectKV(request_id=RequestId("a"), epoch=1, first_block=0, target_block_ids=block_ids(1, 2))
        pair.say(D, msgspec.structs.replace(expect, **change))
        pair.run()
        assert failure(pair, D).error.code == "protocol_error"
        pair.assert_quiescent()


# ---------------------------------------------------------------- links


@pytest.mark.fault("F27")
def test_other_geometry_is_refused_and_fails_the_transfer_for_good() -> None:
    other = msgspec.structs.replace(GEOMETRY, block_size=8)
    with Pair(d={"geometry": other}) as pair:
        pair.open(A, block_ids(1, 2))
        pair.run()
        error = failure(pair).error
        assert error.code == "geometry_mismatch"
        assert "block_size: 8 != 4" in error.message
        assert not error.retryable
        assert pair.counter(D, "links_refused") == 1
        assert not pair.connections


def test_frame_on_a_link_nobody_opened_is_answered() -> None:
    with Pair() as pair:
        frame = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=0,
            first_block=0,
            target_block_ids=block_ids(1),
            source_block_ids=block_ids(1),
            num_bytes=BLOCK_BYTES,
            digest=0,
        )
        actions = pair.ends[D].machine.handle(Received(PeerId("x#1"), frame), 0.0)
        assert [action.message for action in actions if isinstance(action, Send)] == [
            LinkRefused(reason="frames need an accepted link")
        ]


@pytest.mark.parametrize(
    ("peer", "message"),
    [("x#1", ExpectKV(**A._asdict(), first_block=0, target_block_ids=[])), (D_NODE, Leaving())],
)
def test_message_no_messager_takes_is_counted_and_logged_once(peer: str, message: Message) -> None:
    with Pair() as pair:
        for _ in range(3):
            pair.feed(D, Received(PeerId(peer), message))
        assert [(log.event, log.fields["peer"]) for log in pair.ends[D].logs] == [("unexpected message", peer)]
        pair.advance(1.0)
        [stats] = pair.told(D, MessagerStats)
        assert isinstance(stats, MessagerStats)
        assert stats.counters["messager_unexpected_messages"] == 3.0


def test_pool_mapped_for_a_sender_that_is_gone_is_given_back() -> None:
    with Pair() as pair:
        pair.open(A, block_ids(1))
        pair.run([(P_NODE, P), (P, D)])
        pair.lose(D, P)
        pair.run()
        assert not pair.num_accepted(D)


def test_sender_that_comes_again_with_another_pool_gets_a_new_link() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run()
        another = LinkOffer(pair.fastest, msgspec.json.encode(pair.ends[D].pool.handle))
        pair.feed(D, Received(P, LinkHello(geometry=GEOMETRY, offers=[another])))
        assert failure(pair, D).error.code == "peer_lost"
        pair.run()
        assert pair.num_accepted(D) == 1


def test_silent_receiver_is_lost_and_its_transfers_fail() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run()
        pair.on_wire = lambda src, _dst, message: [] if src == D else [message]
        pair.advance(6)
        assert failure(pair).error.code == "peer_lost"
        assert not pair.connections


def test_silent_sender_is_lost_and_what_came_from_it_fails() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal(A, 0, 0, sources)
        pair.run()
        pair.expect(Attempt(RequestId("b"), 1), block_ids(60, 61))  # nothing of it came from that sender
        pair.run()
        pair.on_wire = lambda src, _dst, message: [] if src == P else [message]
        pair.advance(6)
        assert failure(pair, D).request_id == "a"
        assert not pair.num_accepted(D)


def test_heartbeats_keep_an_idle_link() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.advance(100)
        assert received(pair, Heartbeat)
        pair.signal_all(A, sources)
        pair.run()
        assert pair.counter(P, f"links_{pair.fastest}") == 1
        pair.assert_moved(A)


def test_receiver_that_never_answers_fails_the_transfer() -> None:
    with Pair() as pair:
        pair.on_wire = lambda _src, _dst, message: [] if isinstance(message, LinkAccepted | Heartbeat) else [message]
        pair.open(A, block_ids(1))
        pair.run()
        pair.advance(6)
        assert failure(pair).error.code == "peer_lost"
        pair.assert_quiescent()


def test_lost_link_is_opened_anew_for_the_next_transfer() -> None:
    with Pair() as pair:
        started(pair)
        pair.feed(P, PeerLost(D, "queue full"))
        assert failure(pair).error.code == "peer_lost"
        pair.cancel(A)
        pair.run()
        again = Attempt(RequestId("a"), 2)
        sources, targets = one_of_each(pair, again)
        pair.ends[P].pool.planes[:] = pair.original
        pair.signal_all(again, sources)
        pair.open(again, targets)
        pair.run()
        pair.assert_moved(again)


@pytest.mark.parametrize("me", [P, D])
def test_messager_ends_with_its_node(me: PeerId) -> None:
    with Pair() as pair:
        started(pair)
        pair.feed(me, PeerLost(P_NODE if me == P else D_NODE, "gone"))
        assert pair.ends[me].exit_reason == "the node has ended or is lost: gone"


# ---------------------------------------------------------------- closing and cancelling


def test_close_waits_for_the_frames_under_way() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.close_transfer(A)
        pair.run([(P_NODE, P)])
        assert pair.endings(P, A) == [], "frames with P's blocks are still queued"
        pair.run()
        assert pair.endings(P, A) == ["TransferClosed"]


@pytest.mark.parametrize("closed_first", [True, False])
def test_corrupt_block_is_reported_although_the_transfer_is_closed(closed_first: bool) -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.corrupt_payload = True
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        pair.step([(P, D)])
        if closed_first:
            pair.close_transfer(A)
            pair.run([(P_NODE, P)])
        pair.step([(D, P)])
        if not closed_first:
            assert pair.endings(P, A) == [], "other frames are not acknowledged"
            pair.close_transfer(A)
        pair.run()
        assert pair.endings(P, A) == ["TransferFailed", "TransferClosed"]
        assert failure(pair).error.code == "corrupt_kv"
        pair.assert_quiescent()


def test_close_is_answered_when_the_link_is_lost() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.close_transfer(A)
        pair.run([(P_NODE, P)])
        pair.feed(P, PeerLost(D, "gone"))
        assert pair.endings(P, A) == [], "the link may still read the blocks"
        pair.run([(SERVICE, P)])
        assert pair.endings(P, A) == ["TransferClosed"]


def test_frame_that_the_link_cannot_send_fails_the_transfer_and_returns_its_credit() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.ends[P].handlers[SendFrame] = lambda action: pair.channels[SERVICE, P].append(
            FrameSent(action.frame, TransferError("the device is gone"))
        )
        pair.signal_all(A, sources)
        pair.run()
        assert failure(pair).error.message == "the device is gone"
        pair.cancel(A)
        pair.run()
        pair.assert_quiescent()


def _lost_on_the_way(pair: Pair) -> None:
    """Let the link say that it cannot move bytes any more, while messages still reach D."""
    pair.feed(P, LinkLost(D, "no route"))
    assert failure(pair).error.code == "peer_lost"
    assert "no route" in failure(pair).error.message
    pair.cancel(A)
    pair.run()


@pytest.mark.parametrize("has_moved", [False, True])
def test_kind_of_link_that_was_lost_before_it_moved_anything_gives_way_to_others(has_moved: bool) -> None:
    with Pair(links=("ipc", "tcp")) as pair:
        if has_moved:
            before = Attempt(RequestId("before"), 1)
            sources, _ = started(pair, before)
            pair.signal_all(before, sources)
            pair.run()
        started(pair)
        _lost_on_the_way(pair)
        again = Attempt(RequestId("a"), 2)
        sources, _ = started(pair, again)
        pair.signal_all(again, sources)
        pair.run()
        pair.assert_moved(again)
        assert [pair.counter(P, f"links_{kind}") for kind in ("ipc", "tcp")] == ([2, 0] if has_moved else [1, 1])
        pair.assert_quiescent()


def test_only_kind_of_link_is_used_again_after_it_was_lost() -> None:
    with Pair(links=("ipc",)) as pair:
        started(pair)
        _lost_on_the_way(pair)
        again = Attempt(RequestId("a"), 2)
        sources, _ = started(pair, again)
        pair.signal_all(again, sources)
        pair.run()
        pair.assert_moved(again)


def test_no_more_frames_are_under_way_than_the_receiver_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair() as pair:
        monkeypatch.setattr(link_class(pair.fastest), "max_frame_bytes", BLOCK_BYTES)
        slots: dict[tuple[int, int], int] = {}

        def watch(_src: PeerId, _dst: PeerId, message: Message) -> list[Message]:
            if isinstance(message, LinkAccepted):
                return [msgspec.structs.replace(message, max_frames=2)]
            if isinstance(message, KVFrame):
                assert message.slot in {0, 1} - set(slots.values())
                slots[message.layer, message.first_block] = message.slot
            elif isinstance(message, FrameAck):
                del slots[message.layer, message.first_block]
            return [message]

        pair.on_wire = watch
        sources, _ = started(pair, num_blocks=6)
        pair.signal_all(A, sources)
        pair.run()
        pair.assert_moved(A)
        assert len(pair.frames) == 6 * GEOMETRY.num_layers


def test_receiver_that_takes_no_frame_is_given_up() -> None:
    with Pair() as pair:
        pair.on_wire = lambda _src, _dst, message: [
            msgspec.structs.replace(message, max_frames=0) if isinstance(message, LinkAccepted) else message
        ]
        pair.open(A, block_ids(1))
        pair.run()
        assert "has no room" in failure(pair).error.message


def test_link_of_a_kind_that_was_not_offered_is_given_up() -> None:
    with Pair(links=("ipc",)) as pair:
        pair.on_wire = lambda _src, _dst, message: [
            msgspec.structs.replace(message, kind="shm") if isinstance(message, LinkAccepted) else message
        ]
        pair.open(A, block_ids(1))
        pair.run()
        assert "which was not offered" in failure(pair).error.message
        assert not pair.connections


@pytest.mark.parametrize(
    "offers",
    [
        [],
        [LinkOffer("interface", b"")],
        [LinkOffer("unheard of", b"")],
        [LinkOffer("shm", b""), LinkOffer("shm", b'{"type": "device"}'), LinkOffer("shm", b"\xff")],
        [LinkOffer("cuda", b""), LinkOffer("cuda", b'{"type": "host"}'), LinkOffer("cuda", b"\xff")],
    ],
)
def test_link_without_a_possible_offer_is_refused(offers: list[LinkOffer]) -> None:
    with Pair() as pair:
        pair.on_wire = lambda _src, _dst, message: [
            msgspec.structs.replace(message, offers=offers) if isinstance(message, LinkHello) else message
        ]
        pair.open(A, block_ids(1))
        pair.run()
        assert "none of the links offered is possible" in failure(pair).error.message
        assert not pair.num_accepted(D)
        pair.assert_quiescent()


def test_close_without_an_acknowledgement_is_answered_in_time() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.on_wire = lambda _src, _dst, message: [] if isinstance(message, KVFrame) else [message]
        pair.signal_all(A, sources)
        pair.close_transfer(A)
        pair.run()
        pair.advance(61)
        assert pair.endings(P, A) == ["TransferClosed"]


@pytest.mark.fault("F24")
def test_close_drops_signals_that_never_saw_a_reservation() -> None:
    with Pair() as pair:
        pair.signal_all(A, block_ids(1, 2, 3))
        pair.close_transfer(A)
        pair.run()
        assert pair.endings(P, A) == ["TransferClosed"]
        pair.assert_quiescent()


def test_unknown_close_and_cancel_are_answered() -> None:
    with Pair() as pair:
        pair.close_transfer(A)
        pair.cancel(A)
        pair.run()
        assert pair.endings(P, A) == ["TransferClosed"]
        assert pair.endings(D, A) == ["KVCancelled"]


def test_open_after_close_is_answered() -> None:
    with Pair() as pair:
        pair.close_transfer(A)
        pair.open(A, block_ids(1))
        pair.run()
        assert pair.endings(P, A) == ["TransferClosed", "TransferFailed"]
        pair.assert_quiescent()


@pytest.mark.fault("F01")
def test_cancel_waits_for_the_write_under_way() -> None:
    with Pair() as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        network = [(P_NODE, P), (P, D), (D_NODE, D)]
        pair.run(network)  # all frames are there, none is written
        pair.cancel(A)
        pair.run(network)
        assert pair.endings(D, A) == [], "the blocks are being written"
        pair.run()
        assert pair.endings(D, A) == ["KVCancelled"]
        pair.assert_quiescent()


def test_frames_after_a_cancel_are_stale_even_while_a_write_ends() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        pair.step([(P, D)])
        pair.cancel(A)
        pair.run([(D_NODE, D)])
        pair.run([(P, D)])
        pair.run()
        assert pair.counter(D, "frames_written") == 1
        assert pair.counter(D, "stale_frames") == 2


@pytest.mark.fault("F28")
def test_frames_of_another_messager_than_the_prefill_nodes_are_not_written() -> None:
    """Before, any process that knew request id and epoch could write into the blocks, or end the transfer."""
    stranger = PeerId("x.messager#1")
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.on_wire = lambda src, dst, message: (
            [] if dst == stranger or (src == P and isinstance(message, KVFrame)) else [message]
        )
        pair.signal_all(A, sources)
        pair.run()
        [hello] = received(pair, LinkHello)
        pair.feed(D, Received(stranger, hello))
        pair.run()
        written = pair.counter(D, "frames_written")
        for frame in pair.frames:
            wrong = msgspec.structs.replace(frame, num_bytes=frame.num_bytes + 1)
            pair.feed(D, Received(stranger, frame, (memoryview(b"x" * frame.num_bytes),)))
            pair.feed(D, Received(stranger, wrong, (memoryview(b"x"),)))
        pair.run()
        assert pair.counter(D, "frames_written") == written == 0
        assert pair.endings(D, A) == []
        assert not pair.ends[D].pool.planes.any()


@pytest.mark.fault("F14")
def test_copy_of_a_frame_is_stale_once_its_blocks_were_given_up() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run()
        assert pair.endings(D, A) == ["KVArrived"]
        pair.cancel(A)
        pair.run()
        pair.feed(D, Received(P, pair.frames[0]))
        assert pair.counter(D, "stale_frames") == 1


def test_failed_expectation_waits_for_the_other_writes() -> None:
    with Pair(links=("ipc",)) as pair:
        sources, _ = started(pair)
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        pair.corrupt_payload = True
        pair.step([(P, D)])
        pair.corrupt_payload = False
        pair.run([(P, D)])
        pair.step([(SERVICE, D)])
        assert pair.endings(D, A) == [], "two more frames are being written"
        pair.run()
        assert pair.endings(D, A) == ["KVFailed"]
        pair.assert_quiescent()


EVENTS = ("open", "signals", "close", "acks", "cancel")


@pytest.mark.fault("F15", "F24")
@pytest.mark.parametrize("order", list(itertools.permutations(EVENTS)), ids="-".join)
def test_every_order_of_open_signals_close_acks_and_cancel(order: tuple[str, ...]) -> None:
    """Whatever comes first, both nodes get their answers, once, and no block is touched after them."""
    with Pair(links=("ipc",)) as pair:
        sources, targets = one_of_each(pair, A)
        pair.run()
        for event in order:
            match event:
                case "open":
                    pair.open(A, targets)
                case "signals":
                    pair.signal_all(A, sources)
                case "close":
                    pair.close_transfer(A)
                case "cancel":
                    pair.cancel(A)
                case "acks":
                    pair.run()
            pair.run([(P_NODE, P), (D_NODE, D)])
        pair.run()
        assert pair.endings(P, A).count("TransferClosed") == 1
        assert len(pair.endings(P, A)) <= 2
        assert pair.endings(D, A) in (["KVCancelled"], ["KVArrived", "KVCancelled"])
        if order.index("close") < order.index("signals"):
            assert "TransferDone" not in pair.endings(P, A)
        pair.cancel(A)
        pair.close_transfer(A)
        pair.run()
        pair.assert_quiescent()  # nor is a late signal kept for ever


@pytest.mark.fault("F01", "F14", "F16")
@pytest.mark.parametrize("seed", range(60))
def test_any_mishap_in_any_order_ends_once_and_leaves_nothing(seed: int) -> None:
    """Frames and acks lost, doubled and damaged, attempts closed and cancelled, slots used again."""
    rng = random.Random(seed)
    with Pair(seed, links=(rng.choice(["shm", "ipc"]),), d={"max_inflight_bytes": 6 * BLOCK_BYTES}) as pair:
        pair.on_wire = lambda _src, _dst, message: _mishap(rng, message)
        for epoch in range(1, 6):
            attempt = Attempt(RequestId("a"), epoch)
            pair.ends[P].pool.planes[:] = pair.original
            sources, targets = one_of_each(pair, attempt, num_blocks=8)
            pair.ends[D].pool.planes[:] = 0
            pair.run([(D_NODE, D)])
            pair.open(attempt, targets)
            pair.signal_all(attempt, sources)
            for _ in range(rng.randrange(40)):
                pair.step()
            if rng.random() < 0.5:
                pair.close_transfer(attempt)
            for _ in range(rng.randrange(10)):
                pair.step()
            if rng.random() < 0.3:
                pair.cancel(attempt)
            pair.run()
            pair.advance(70)
            ends = pair.endings(P, attempt)
            assert len(set(ends)) == len(ends) >= 1
            if "KVArrived" in pair.endings(D, attempt):
                pair.assert_moved(attempt)
            pair.cancel(attempt)
            pair.run()
            pair.assert_quiescent()


def _mishap(rng: random.Random, message: Message) -> list[Message]:
    if not isinstance(message, KVFrame | FrameAck):
        return [message]
    chance = rng.random()
    if chance < 0.05:
        return []
    if chance < 0.15:
        return [message, message]
    if chance < 0.2 and isinstance(message, KVFrame):
        return [msgspec.structs.replace(message, digest=message.digest ^ 1)]
    return [message]
