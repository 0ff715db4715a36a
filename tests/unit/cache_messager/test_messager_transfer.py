"""A KV transfer between two messagers when all goes well."""

from __future__ import annotations

import random

import pytest
from messager_pair import BLOCK_BYTES, GEOMETRY, P_NODE, D, P, Pair, one_of_each
from support.ids import block_ids

from cache_messager import pending
from cache_messager.links import link_class
from cache_messager.transfer import TRANSITIONS, TransferStatus
from kvrelay.config.sections import TransferConfig
from kvrelay.protocol.ids import Attempt, RequestId
from kvrelay.protocol.messages.base import LinkAddress, Message
from kvrelay.protocol.messages.messager_to_node import (
    KVArrived,
    KVExpected,
    MessagerReady,
    MessagerStats,
    TransferDone,
    TransferFailed,
)
from kvrelay.protocol.messages.node_to_messager import CachedSignal, KVSpan, LayerSignal, OpenTransfer, StopMessager

A = Attempt(RequestId("a"), 1)

pytestmark = pytest.mark.usefixtures("pair_pools")


def link_kinds(setting: str) -> tuple[str, ...]:
    return TransferConfig.model_validate({"link": setting}).link_kinds


@pytest.mark.parametrize(
    ("setting", "hosts", "link"),
    [
        ("auto", ("here", "here"), "shm"),
        ("auto", ("here", "there"), "tcp"),
        ("zmq", ("here", "here"), "ipc"),
        ("zmq", ("here", "there"), "tcp"),
        ("shm", ("here", "here"), "shm"),
        ("ipc", ("here", "here"), "ipc"),
        ("tcp", ("here", "here"), "tcp"),
    ],
)
def test_blocks_move_over_the_link_the_config_asks_for(setting: str, hosts: tuple[str, str], link: str) -> None:
    with Pair(hosts=hosts, links=link_kinds(setting)) as pair:
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.open(A, targets)
        pair.run()
        (done,) = pair.told(P, TransferDone)
        assert isinstance(done, TransferDone)
        link = pair.fastest if link == "shm" else link
        assert done.link == link
        assert done.num_bytes == 4 * GEOMETRY.block_bytes
        assert [(layer.layer, layer.num_bytes) for layer in done.layers] == [(n, 4 * BLOCK_BYTES) for n in range(3)]
        assert pair.told(D, KVArrived) == [
            KVArrived(request_id=RequestId("a"), epoch=1, num_bytes=4 * GEOMETRY.block_bytes)
        ]
        assert pair.counter(P, f"links_{link}") == 1
        pair.assert_moved(A)
        pair.assert_quiescent()


def test_pool_that_cannot_be_mapped_is_sent_as_payload() -> None:
    with Pair() as pair:
        pair.can_map = False  # the shm offer names no pool
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.open(A, targets)
        pair.run()
        assert pair.told(P, TransferDone)[0].link == "ipc"  # type: ignore[attr-defined]
        pair.assert_moved(A)


@pytest.mark.parametrize("setting", ["shm", "ipc"])
def test_link_within_a_host_to_another_host_fails_the_transfer(setting: str) -> None:
    with Pair(hosts=("here", "there"), links=link_kinds(setting)) as pair:
        pair.open(A, block_ids(1))
        pair.run()
        (failed,) = pair.told(P, TransferFailed)
        assert isinstance(failed, TransferFailed)
        assert "another host" in failed.error.message
        pair.assert_quiescent()


def test_layer_times_span_first_frame_to_last_acknowledgement() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.open(A, targets)
        pair.run()
        for layer in range(3):
            pair.now = 2000.0 + 10 * layer
            pair.signal(A, layer, 0, sources[:2])
            pair.run()
            pair.now += 0.5
            pair.signal(A, layer, 2, sources)
            pair.run([(P_NODE, P)])
            pair.now += 0.5
            pair.run()
        (done,) = pair.told(P, TransferDone)
        assert isinstance(done, TransferDone)
        assert [(layer.first_sent_s, layer.last_written_s) for layer in done.layers] == [
            (2000.0, 2001.0),
            (2010.0, 2011.0),
            (2020.0, 2021.0),
        ]


@pytest.mark.fault("F24")
def test_signals_before_the_reservation_are_kept_and_sent_as_one_frame() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.run()
        assert not pair.frames
        assert pair.ends[P].machine.gauges()["pending_signals"] == 3
        pair.open(A, targets)
        pair.run()
        assert [frame.layers for frame in pair.frames] == [range(3)]
        assert pair.ends[P].machine.gauges()["pending_signals"] == 0
        assert pair.counter(P, "pending_signals_total") == 3
        pair.assert_moved(A)


def test_blocks_that_d_has_already_are_not_sent() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A, num_blocks=6, first_block=4)
        pair.signal_all(A, sources)
        pair.open(A, targets, first_block=4)
        pair.run()
        assert pair.told(P, TransferDone)[0].num_bytes == 2 * GEOMETRY.block_bytes  # type: ignore[attr-defined]
        pair.assert_moved(A, first_block=4)


def test_full_prefix_hit_on_d_is_done_and_arrived_at_once() -> None:
    with Pair() as pair:
        pair.expect(A, [], first_block=4)
        pair.open(A, [], first_block=4)
        pair.run()
        assert [type(message) for message in pair.told(D, KVExpected, KVArrived)] == [KVExpected, KVArrived]
        assert pair.told(P, TransferDone)[0].num_bytes == 0  # type: ignore[attr-defined]
        pair.signal_all(A, block_ids(1, 2, 3, 4))  # P computes on: its signals find the transfer over
        pair.run()
        assert not pair.frames
        pair.assert_quiescent()


def test_cached_blocks_are_sent_in_every_layer_and_only_once() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.cached(A, sources[:3])
        pair.open(A, targets)
        pair.signal_all(A, sources)  # tells of the cached ones again
        pair.run()
        assert pair.counter(P, "bytes_sent") == 4 * GEOMETRY.block_bytes
        pair.assert_moved(A)


def test_waiting_chunks_of_a_layer_travel_as_one_frame() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A, num_blocks=6)
        for end in range(1, 7):
            pair.signal(A, 0, end - 1, sources[:end])
        pair.open(A, targets)
        pair.run()
        assert [len(frame.target_block_ids) for frame in pair.frames] == [6]


@pytest.mark.parametrize(("max_blocks", "frames"), [(11, [range(2), range(2, 3)]), (15, [range(3)])])
def test_layers_signalled_together_share_frames_as_large_as_the_link_allows(
    monkeypatch: pytest.MonkeyPatch, max_blocks: int, frames: list[range]
) -> None:
    with Pair() as pair:
        monkeypatch.setattr(link_class(pair.fastest), "max_frame_bytes", max_blocks * BLOCK_BYTES)
        sources, targets = one_of_each(pair, A, num_blocks=5)
        pair.signal_layers(A, range(3), sources)
        pair.open(A, targets)
        pair.run()
        assert [frame.layers for frame in pair.frames] == frames
        pair.assert_moved(A)


def test_frame_of_several_layers_keeps_to_the_credit_that_is_left() -> None:
    with Pair(d={"max_inflight_bytes": 10 * BLOCK_BYTES}) as pair:
        sources, targets = one_of_each(pair, A, num_blocks=1)
        pair.signal_all(A, sources)
        pair.open(A, targets)
        other = Attempt(RequestId("b"), 1)
        sources, targets = (pair.rng.sample(block_ids(*range(32, 64)), 9) for _ in range(2))
        pair.expect(other, targets)
        pair.signal_all(other, sources)
        pair.open(other, targets)
        pair.run()
        assert pair.max_unacked_bytes <= 10 * BLOCK_BYTES
        pair.assert_moved(A)
        pair.assert_moved(other)


def test_only_layers_with_the_same_blocks_share_a_frame() -> None:
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.sources[A] = sources
        pair.signal(A, 0, 0, sources)
        pair.signal(A, 1, 0, sources)
        pair.signal(A, 2, 0, sources[:3])
        pair.open(A, targets)
        pair.run()
        pair.signal(A, 2, 3, sources)
        pair.run()
        layers = [(frame.layers, len(frame.target_block_ids)) for frame in pair.frames]
        assert layers == [(range(2), 4), (range(2, 3), 3), (range(2, 3), 1)]
        (done,) = pair.told(P, TransferDone)
        assert [layer.num_bytes for layer in done.layers] == [4 * BLOCK_BYTES] * 3  # type: ignore[attr-defined]
        pair.assert_moved(A)


def test_link_is_kept_for_the_next_transfer() -> None:
    with Pair() as pair:
        for epoch in (1, 2):
            attempt = Attempt(RequestId("a"), epoch)
            sources, targets = one_of_each(pair, attempt)
            pair.signal_all(attempt, sources)
            pair.open(attempt, targets)
            pair.run()
            pair.ends[P].pool.planes[:] = pair.original
        assert pair.counter(P, "transfers_done") == 2
        assert pair.counter(P, f"links_{pair.fastest}") == 1


# ---------------------------------------------------------------- credit


@pytest.mark.fault("F12")
def test_credit_is_never_exceeded_and_transfers_take_turns() -> None:
    credit = 8 * BLOCK_BYTES
    with Pair(d={"max_inflight_bytes": credit}) as pair:
        attempts = [Attempt(RequestId(name), 1) for name in "abcd"]
        for index, attempt in enumerate(attempts):
            blocks = block_ids(*range(16 * index, 16 * (index + 1)))
            pair.expect(attempt, blocks)
            pair.signal_all(attempt, blocks)
            pair.open(attempt, blocks)
        pair.run()
        assert pair.max_unacked_bytes <= credit
        assert pair.max_unacked_bytes == credit, "the credit was not used"
        turns = [frame.request_id for frame in pair.frames]
        shared = turns[turns.index(RequestId("d")) :][: 4 * 4]
        assert {name: shared.count(RequestId(name)) for name in "abcd"} == dict.fromkeys("abcd", 4)
        for attempt in attempts:
            pair.assert_moved(attempt)
        pair.assert_quiescent()


def test_credit_below_one_block_is_raised_to_one_block() -> None:
    with Pair(d={"max_inflight_bytes": 1}) as pair:
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.open(A, targets)
        pair.run()
        assert pair.max_unacked_bytes == BLOCK_BYTES
        pair.assert_moved(A)


def test_few_small_frames_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_messager.sender_link.MAX_INFLIGHT_FRAMES", 2)
    with Pair() as pair:
        sources, targets = one_of_each(pair, A, num_blocks=8)
        pair.open(A, targets)
        pair.run()
        pair.signal_all(A, sources)
        pair.run([(P_NODE, P)])
        assert len(pair.frames) == 2
        pair.run()
        pair.assert_moved(A)


# ---------------------------------------------------------------- layerwise off


def test_without_layerwise_nothing_is_sent_before_the_last_signal() -> None:
    with Pair(layerwise=False) as pair:
        sources, targets = one_of_each(pair, A)
        pair.open(A, targets)
        for layer in range(3):
            pair.signal(A, layer, 0, sources[:2])
        for layer in range(2):
            pair.signal(A, layer, 2, sources)
        pair.run()
        assert not pair.frames
        pair.advance(1000)
        assert not pair.told(P, TransferFailed), "a transfer that waits for its own node made no progress"
        pair.signal(A, 2, 2, sources)
        pair.run()
        assert [frame.layers for frame in pair.frames] == [range(3)]
        pair.assert_moved(A)


# ---------------------------------------------------------------- any order


@pytest.mark.fault("F24")
@pytest.mark.parametrize("seed", range(40))
def test_any_chunking_in_any_order_moves_every_block_once(seed: int) -> None:
    rng = random.Random(seed)
    link = rng.choice(["shm", "ipc"])
    with Pair(seed, links=(link,), d={"max_inflight_bytes": rng.choice([1, 4, 40]) * BLOCK_BYTES}) as pair:
        blocks = block_ids(*rng.sample(range(64), 64))
        attempts = [Attempt(RequestId(name), 1) for name in "abc"]
        first_blocks = {attempt: rng.randrange(6) for attempt in attempts}
        for attempt in attempts:
            sources = [blocks.pop() for _ in range(rng.randint(6, 20))]
            pair.sources[attempt] = sources
            pair.expect(attempt, rng.sample(sources, len(sources) - first_blocks[attempt]), first_blocks[attempt])
        pair.run()  # D answers before P opens
        script = [event for attempt in attempts for event in _events(rng, pair, attempt, first_blocks[attempt])]
        rng.shuffle(script)
        for event in script:
            pair.say(P, event)
            for _ in range(rng.randrange(4)):
                pair.step()
        pair.run()
        for attempt in attempts:
            assert pair.endings(P, attempt) == ["TransferDone"]
            assert pair.endings(D, attempt) == ["KVArrived"]
            pair.assert_moved(attempt, first_blocks[attempt])
        moved = sum(len(pair.targets[attempt]) for attempt in attempts) * GEOMETRY.block_bytes
        assert pair.counter(D, "bytes_written") == pair.counter(P, "bytes_sent") == moved
        pair.assert_quiescent()


def _events(rng: random.Random, pair: Pair, attempt: Attempt, first_block: int) -> list[Message]:
    """Return what P says about one transfer: OpenTransfer, a cached prefix, and signals of random pieces."""
    sources, (request_id, epoch) = pair.sources[attempt], attempt
    link = LinkAddress(peer=D, host_id="host", tcp="tcp://d", ipc="ipc://d")
    num_cached = rng.randrange(len(sources))
    events: list[Message] = [
        OpenTransfer(
            request_id=request_id,
            epoch=epoch,
            link=link,
            first_block=first_block,
            target_block_ids=pair.targets[attempt],
        ),
        CachedSignal(span=KVSpan(request_id, epoch, 0, sources[:num_cached])),
    ]
    for layer, num_layers in rng.choice([[(0, 1), (1, 1), (2, 1)], [(0, 2), (2, 1)], [(0, 3)]]):
        position = num_cached
        while position < len(sources):
            end = rng.randint(position + 1, len(sources))
            again = rng.randint(0, position)  # some blocks are told of twice
            span = KVSpan(request_id, epoch, again, sources[again:end])
            events.append(LayerSignal(step=position, layer=layer, num_layers=num_layers, spans=[span]))
            position = end
    return events


# ---------------------------------------------------------------- the node's side


def test_ready_names_the_link_and_stats_follow_every_heartbeat() -> None:
    with Pair() as pair:
        (ready,) = pair.told(P, MessagerReady)
        assert isinstance(ready, MessagerReady)
        assert ready.link.peer == P
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.run()
        pair.advance(1)
        assert pair.told(P, MessagerReady) == [ready, ready]  # the first may have been lost
        (stats,) = pair.told(P, MessagerStats)
        assert isinstance(stats, MessagerStats)
        assert stats.counters["pending_signals_total"] == 3
        assert stats.gauges["pending_signals"] == 3
        pair.open(A, targets)
        pair.run()
        pair.advance(1)
        assert pair.told(P, MessagerStats)[-1].counters["bytes_sent"] == 4 * GEOMETRY.block_bytes  # type: ignore[attr-defined]


def test_stop_ends_the_process_and_tells_senders() -> None:
    with Pair() as pair:
        _, targets = one_of_each(pair, A)
        pair.open(A, targets)
        pair.run()
        pair.say(D, StopMessager())
        pair.run()
        assert pair.ends[D].exit_reason == "the node is leaving"
        assert not pair.num_accepted(D)
        (failed,) = pair.told(P, TransferFailed)
        assert isinstance(failed, TransferFailed)
        assert "leaving" in failed.error.message
        assert failed.error.retryable


def test_bound_on_kept_signals_is_a_typed_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MAX_PENDING_BLOCKS", 10)
    with Pair() as pair:
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.run()
        (failed,) = pair.told(P, TransferFailed)
        assert isinstance(failed, TransferFailed)
        assert failed.error.code == "transfer_failed"
        pair.open(A, targets)  # crossed the failure: it is the answer
        pair.signal_all(A, sources)
        pair.run()
        assert pair.endings(P, A) == ["TransferFailed"]
        assert not pair.frames
        pair.cancel(A)
        pair.run()
        pair.assert_quiescent()


def test_transfer_statuses_all_lead_to_the_end() -> None:
    assert set(TRANSITIONS) == set(TransferStatus)
    for status in TransferStatus:
        assert TransferStatus.ENDED in TRANSITIONS[status] or status is TransferStatus.ENDED
