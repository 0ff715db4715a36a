"""The nixl link's own logic, with a double of the library: slots, notices, deadlines, losses."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from fake_nixl import Fabric, FakeAgent, FakeWrite
from messager_pair import GEOMETRY, NUM_BLOCKS
from pools import Pool, make_pool, wrote
from support.ids import block_ids
from test_fourth_link import two_nodes

from cache_messager.links import nixl
from cache_messager.links.nixl import agent as nixl_agent
from cache_messager.links.nixl.agent import Agent
from cache_messager.links.nixl.receiver import FrameReader
from cache_messager.links.nixl.sender import FrameWriter
from cache_messager.links.nixl.staging import NUM_SLOTS, Areas
from cache_messager.links.nixl.thread import RunningClock
from cache_messager.sender_link import choose_route
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent, LinkLost
from kvrelay.config.sections import TransferConfig
from kvrelay.errors import CorruptKVError, PeerLostError, TransferError, TransferTimeoutError
from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import KVFrame, LinkOffer

D = PeerId("d0.messager#1")
OTHER = PeerId("d1.messager#1")
TIMEOUT_S = 5.0
SOURCES, TARGETS = block_ids(5, 1, 2), block_ids(0, 7, 4)

DEEP = b"\x91" * 30_000
"""Lists in lists, more than can be read."""


class Host:
    """A messager that keeps what its links send and post."""

    checksum = True
    peer_timeout_s = TIMEOUT_S
    is_only_kind = True

    def __init__(self, pool: Pool) -> None:
        self.pool: KVPool = pool
        self.sent: list[tuple[PeerId, KVFrame]] = []
        self.events: list[object] = []

    def send(self, peer: PeerId, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        assert not payload
        self.sent.append((peer, frame))

    def post(self, event: object) -> None:
        self.events.append(event)


class End:
    """A pool with both ends of links, at a time that the test sets."""

    def __init__(self, fabric: Fabric, pool: Pool) -> None:
        agent = fabric.create_agent()
        assert isinstance(agent, FakeAgent)
        self.agent = agent
        self.pool = pool
        self.host = Host(pool)
        areas = Areas(agent, 1 << 20)
        self.writer = FrameWriter(self.host, agent, areas)
        self.reader = FrameReader(self.host, agent, areas)

    def send(self, peer: PeerId, slot: int = 0, layer: int = 0) -> KVFrame:
        """Send SOURCES of ``layer`` and return the frame as the machine made it."""
        frame = KVFrame(
            request_id=RequestId("a"),
            epoch=1,
            layer=layer,
            first_block=0,
            target_block_ids=TARGETS,
            source_block_ids=[],
            num_bytes=len(SOURCES) * GEOMETRY.layer_block_bytes,
            digest=0,
            slot=slot,
        )
        self.writer.send(peer, frame, SOURCES)
        return frame

    def last_sent(self) -> KVFrame:
        """Return the frame that was sent last."""
        return self.host.sent[-1][1]


@pytest.fixture
def ends(on_device: bool) -> Iterator[tuple[End, End]]:
    """P and D with a link 1 from P to D."""
    fabric = Fabric()
    with ExitStack() as stack:
        p, d = (
            End(fabric, stack.enter_context(closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=on_device))))
            for _ in range(2)
        )
        p.pool.planes[:] = np.random.default_rng(3).integers(0, 255, p.pool.planes.shape, np.uint8)
        wrote(p.pool)
        p.writer.open(D, d.reader.accept(1))
        yield p, d


def write(d: End, frame: KVFrame, now: float = 0.0, link_id: int = 1) -> None:
    """Let D's machine hand ``frame`` to the link."""
    d.reader.write(link_id, frame, now)
    d.reader.advance(now)


def test_blocks_arrive_where_they_belong(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D, slot=3, layer=1)
    p.writer.advance(0.0)
    write(d, p.last_sent())
    assert d.host.events == [BlocksWritten(1, p.last_sent())]
    assert np.array_equal(d.pool.planes[1, :, TARGETS], p.pool.planes[1, :, SOURCES])
    untouched = sorted(set(range(NUM_BLOCKS)) - set(TARGETS))
    assert not d.pool.planes[:, :, untouched].any()
    assert not d.pool.planes[0].any()
    p.writer.advance(0.0)
    assert not p.writer.is_busy
    assert not d.reader.is_busy
    assert p.host.events == []


def test_a_frame_waits_for_the_notice_of_its_bytes(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D)
    p.writer.advance(0.0)
    d.agent.is_frozen = True
    write(d, p.last_sent())
    assert d.host.events == []
    assert d.reader.is_busy
    d.agent.is_frozen = False
    d.reader.advance(0.1)
    assert d.host.events == [BlocksWritten(1, p.last_sent())]


def test_the_notice_of_an_earlier_frame_in_the_slot_is_not_enough(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D, layer=0)
    p.writer.advance(0.0)
    d.reader.advance(0.0)  # its frame is refused by D's machine
    p.writer.advance(0.0)
    p.send(D, layer=1)
    p.writer.advance(0.0)
    d.agent.is_frozen = True
    write(d, p.last_sent())
    assert d.host.events == []


@pytest.mark.parametrize("notice", [b"", b"\xc0", b"\x93\x01\x00\xa1x", b"\x94\x01\x00\x00" + DEEP])
def test_a_notice_that_is_none_does_not_matter(ends: tuple[End, End], notice: bytes) -> None:
    p, d = ends
    p.send(D)
    d.agent.incoming.append(FakeWrite(0, 0, 0, notice))
    p.writer.advance(0.0)
    write(d, p.last_sent())
    assert d.host.events == [BlocksWritten(1, p.last_sent())]


def _flip(address: int) -> None:
    ctypes.c_ubyte.from_address(address).value ^= 1


@pytest.mark.parametrize("where", ["sender's staging", "receiver's staging"])
def test_bytes_damaged_in_staging_are_noticed(ends: tuple[End, End], where: str) -> None:
    p, d = ends
    p.send(D)
    p.writer.advance(0.0)
    if where == "sender's staging":
        _flip(d.agent.incoming[0].source)
    else:
        d.agent.damage = lambda arrived: _flip(arrived.target + arrived.num_bytes - 1)
    write(d, p.last_sent())
    (event,) = d.host.events
    assert isinstance(event, BlocksWritten)
    assert isinstance(event.error, CorruptKVError)


def test_a_write_that_only_claims_to_be_done_ends_at_the_receivers_deadline(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D)
    p.writer.advance(0.0)
    d.agent.incoming.pop().claims_done = True
    p.writer.advance(0.0)
    assert not p.writer.is_busy
    write(d, p.last_sent())
    d.reader.advance(1.9 * TIMEOUT_S)
    assert d.host.events == []
    d.reader.advance(2 * TIMEOUT_S)
    (event,) = d.host.events
    assert isinstance(event, BlocksWritten)
    assert isinstance(event.error, TransferTimeoutError)
    assert not d.pool.planes.any()
    assert not d.reader.is_busy


def _second_receiver(ends: tuple[End, End], stack: ExitStack) -> End:
    p, d = ends
    pool = make_pool(GEOMETRY, NUM_BLOCKS, on_device=not hasattr(d.pool, "size_bytes"))
    other = End(d.agent._fabric, stack.enter_context(closing(pool)))
    p.writer.open(OTHER, other.reader.accept(1))
    return other


def test_a_frozen_peer_loses_its_own_link_at_the_deadline(ends: tuple[End, End]) -> None:
    p, d = ends
    d.agent.is_frozen = True
    with ExitStack() as stack:
        other = _second_receiver(ends, stack)
        for slot in range(NUM_SLOTS):
            p.send(D, slot)
            p.writer.advance(0.0)
        waiting = p.send(D, 0)
        p.send(OTHER, 0)
        p.writer.advance(TIMEOUT_S - 0.1)
        write(other, p.last_sent())
        assert other.host.events == [BlocksWritten(1, p.last_sent())]
        assert p.host.events == []
        stuck = list(d.agent.incoming)
        p.writer.advance(TIMEOUT_S)
        unsent, lost = p.host.events
        assert isinstance(unsent, FrameSent)
        assert unsent.frame == waiting
        assert isinstance(unsent.error, PeerLostError)
        assert lost == LinkLost(D, "a write took longer than 5.0 s")
        assert all(written.is_released for written in stuck)
        p.send(OTHER, 1)
        p.writer.advance(TIMEOUT_S)
        write(other, p.last_sent())
        assert len(other.host.events) == 2


def _fail(written: FakeWrite) -> None:
    written.error = "disconnected"


def test_a_failed_write_loses_the_link_and_a_new_one_works(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D)
    p.writer.advance(0.0)
    _fail(d.agent.incoming[0])
    p.writer.advance(0.0)
    assert p.host.events == [LinkLost(D, "disconnected")]
    late = p.send(D)
    (unsent,) = p.host.events[1:]
    assert isinstance(unsent, FrameSent)
    assert unsent.frame == late
    assert isinstance(unsent.error, PeerLostError)
    p.writer.leave(D)  # the machine's answer to LinkLost
    p.writer.open(D, d.reader.accept(2))
    p.send(D, layer=1)
    p.writer.advance(0.0)
    write(d, p.last_sent(), link_id=2)
    assert d.host.events == [BlocksWritten(2, p.last_sent())]


def test_a_write_that_cannot_start_fails_its_frame_and_loses_the_link(ends: tuple[End, End]) -> None:
    p, _ = ends
    p.agent.refuses_writes = True
    frame = p.send(D)
    p.writer.advance(0.0)
    unsent, lost = p.host.events
    assert isinstance(unsent, FrameSent)
    assert unsent.frame == frame
    assert isinstance(unsent.error, PeerLostError)
    assert lost == LinkLost(D, "no route")
    assert p.host.sent == []


def test_a_slot_is_not_reused_while_it_is_read(ends: tuple[End, End]) -> None:
    """D's machine refuses a frame without its link, and so the slot is free before the write has ended."""
    p, d = ends
    p.send(D, slot=2, layer=0)
    p.writer.advance(0.0)
    d.agent.is_frozen = True
    p.send(D, slot=2, layer=1)
    p.send(D, slot=1, layer=2)
    p.writer.advance(0.0)
    p.writer.advance(0.0)
    assert [frame.layer for _, frame in p.host.sent] == [0, 2]
    d.agent.is_frozen = False
    d.reader.advance(0.0)
    p.writer.advance(0.0)
    assert [frame.layer for _, frame in p.host.sent] == [0, 2, 1]
    write(d, p.last_sent())
    assert d.host.events == [BlocksWritten(1, p.last_sent())]


def test_a_dropped_link_ends_its_waiting_frames_and_late_bytes_touch_no_block(ends: tuple[End, End]) -> None:
    p, d = ends
    p.send(D)
    p.writer.advance(0.0)
    d.agent.is_frozen = True
    write(d, p.last_sent())
    d.reader.drop(1)
    (event,) = d.host.events
    assert isinstance(event, BlocksWritten)
    assert isinstance(event.error, PeerLostError)
    assert not d.reader.has_links
    d.agent.is_frozen = False
    d.reader.advance(0.0)
    assert not d.pool.planes.any()


def test_bytes_that_a_lost_sender_writes_late_are_noticed(ends: tuple[End, End]) -> None:
    """The areas of a dropped link serve the next one."""
    p, d = ends
    p.send(D, layer=0)
    p.writer.advance(0.0)
    late = d.agent.incoming.pop()
    d.reader.drop(1)
    p.writer.leave(D)
    p.writer.open(D, d.reader.accept(2))
    p.send(D, layer=1)
    p.writer.advance(0.0)
    (written,) = d.agent.incoming
    assert written.target == late.target
    d.agent.damage = lambda arrived: _flip(arrived.target)
    write(d, p.last_sent(), link_id=2)
    (event,) = d.host.events
    assert isinstance(event, BlocksWritten)
    assert isinstance(event.error, CorruptKVError)


@pytest.mark.parametrize("change", [{"slot": NUM_SLOTS}, {"slot": -1}, {"num_bytes": (1 << 20) + 1}])
def test_frames_that_no_slot_holds_are_refused_at_both_ends(ends: tuple[End, End], change: dict[str, int]) -> None:
    p, d = ends
    fields: dict[str, Any] = {**{name: getattr(p.send(D), name) for name in KVFrame.__struct_fields__}, **change}
    frame = KVFrame(**fields)
    p.writer.send(D, frame, SOURCES)
    (unsent,) = p.host.events
    assert isinstance(unsent, FrameSent)
    assert isinstance(unsent.error, TransferError)
    write(d, frame)
    (event,) = d.host.events
    assert isinstance(event, BlocksWritten)
    assert event.error is not None
    assert "broke the protocol" in event.error.message


@pytest.mark.parametrize("handle", [b"", b"\xc0", b"\x81\xa1x\x01", b"\x81\xa1x" + DEEP, b"\x81\xa1\xff\x01"])
def test_a_handle_that_is_none_loses_the_link(ends: tuple[End, End], handle: bytes) -> None:
    p, _ = ends
    p.writer.open(D, handle)
    (lost,) = p.host.events
    assert isinstance(lost, LinkLost)


def test_without_the_library_there_is_no_offer_and_none_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "find_spec", lambda _: None)
    with closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=False)) as pool, closing(nixl.Link(Host(pool))) as link:
        assert link.offer() is None
        with pytest.raises(TransferError, match="not installed"):
            link.accept(1, b"host")


@pytest.mark.parametrize("has_devices", [False, True])
@pytest.mark.parametrize("is_only_kind", [False, True])
def test_without_rdma_it_is_offered_only_if_the_config_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_devices: bool, is_only_kind: bool
) -> None:
    monkeypatch.setattr(nixl, "reason_against", lambda: None)
    monkeypatch.setattr(nixl_agent, "RDMA_DEVICES", tmp_path if has_devices else tmp_path / "none")
    (tmp_path / "mlx5_0").mkdir()
    with closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=False)) as pool:
        host = Host(pool)
        host.is_only_kind = is_only_kind
        with closing(nixl.Link(host)) as link:
            assert (link.offer() is not None) is (has_devices or is_only_kind)


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    """The double of the library in the place of the library."""
    fabric = Fabric()
    monkeypatch.setattr(nixl, "reason_against", lambda: None)
    monkeypatch.setattr(nixl, "has_rdma", lambda: True)
    monkeypatch.setattr(nixl.Link, "create_agent", staticmethod(fabric.create_agent))
    return fabric


def test_two_messagers_move_blocks(tmp_path: Path, fabric: Fabric) -> None:
    blocks = block_ids(*np.random.default_rng(7).permutation(NUM_BLOCKS).tolist())
    assert uvloop.run(two_nodes(tmp_path, blocks[:40], blocks[20:60], ("nixl", "tcp"))) == "nixl"
    assert len(fabric.agents) == 2


def test_a_receiver_without_the_library_takes_the_next_offer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fabric: Fabric
) -> None:
    def create_none() -> Agent:
        raise TransferError("the library nixl is not installed")

    monkeypatch.setattr(nixl.Link, "create_agent", staticmethod(create_none))
    assert uvloop.run(two_nodes(tmp_path, block_ids(1, 2), block_ids(3, 4), ("nixl", "tcp"))) == "tcp"
    assert not fabric.agents


def test_a_bug_in_the_links_thread_ends_the_messager(monkeypatch: pytest.MonkeyPatch, fabric: Fabric) -> None:
    monkeypatch.setattr(FrameReader, "advance", lambda _self, _now: 1 / 0)
    with closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=False)) as pool:
        host = Host(pool)
        link = nixl.Link(host)
        link.accept(1, b"host")
        link.accept(2, b"host")  # nobody waits for ever
        link.close()
        event = host.events[0]
        assert isinstance(event, DeviceLost)
        assert "ZeroDivisionError" in event.reason


@pytest.mark.parametrize(("host", "kinds"), [("here", ["cuda", "shm", "ipc"]), ("there", ["nixl", "tcp"])])
def test_auto_offers_nixl_to_other_hosts_and_before_tcp(host: str, kinds: list[str]) -> None:
    offers = [LinkOffer(kind, b"") for kind in TransferConfig().link_kinds]
    route = choose_route(offers, "here", LinkAddress(peer=D, host_id=host, tcp="tcp://d0", ipc="ipc://d0"))
    assert [offer.kind for offer in route.offers] == kinds


def test_a_pause_of_the_process_is_no_time_that_a_peer_took() -> None:
    times = iter([100.0, 100.1, 100.2, 160.2, 160.3])
    clock = RunningClock(lambda: next(times))
    assert [round(clock.now(), 3) for _ in range(4)] == [0.1, 0.2, 0.4, 0.5]


def test_pools_of_different_memory_have_no_nixl_link() -> None:
    with (
        closing(make_pool(GEOMETRY, NUM_BLOCKS, on_device=True)) as pool,
        pytest.raises(TransferError, match="not in the sender's kind of memory"),
    ):
        nixl.Link(Host(pool)).accept(1, b"host")
