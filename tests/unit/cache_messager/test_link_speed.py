"""How fast a link moves KV, as P's messager measures it and its node reports it."""

from __future__ import annotations

import pytest
from messager_pair import D

from cache_messager.sender_link import SenderLink
from kvrelay.protocol.ids import PeerId, RequestId, messager_of, node_of
from kvrelay.protocol.messages.messager_to_messager import KVFrame, LinkOffer


def frame(num_bytes: int, slot: int) -> KVFrame:
    return KVFrame(
        request_id=RequestId("a"),
        epoch=1,
        layer=0,
        first_block=0,
        target_block_ids=[],
        source_block_ids=[],
        num_bytes=num_bytes,
        digest=0,
        slot=slot,
    )


def sent(link: SenderLink, num_bytes: int, now: float) -> KVFrame:
    return frame(num_bytes, link.take(num_bytes, now))


def acked(link: SenderLink, moved: KVFrame, now: float) -> None:
    link.give_back(moved)
    link.written(moved, now)


def open_link() -> SenderLink:
    link = SenderLink(D, [LinkOffer("tcp", b"")])
    link.accept("tcp", 1 << 20, 8)
    return link


def test_the_time_in_which_nothing_is_under_way_does_not_count() -> None:
    link = open_link()
    assert link.speed.at(10.0) is None
    acked(link, sent(link, 1000, 10.0), 10.5)
    assert link.speed.at(10.5) == 2000
    acked(link, sent(link, 1000, 11.0), 11.5)  # the KV of the next layer was not there yet
    assert link.speed.at(11.5) == pytest.approx(2000)


def test_frames_that_are_under_way_together_share_the_time() -> None:
    link = open_link()
    first, second = sent(link, 1000, 10.0), sent(link, 1000, 10.0)
    acked(link, first, 11.0)
    assert link.speed.at(11.0) == 1000
    third = sent(link, 1000, 11.0)
    acked(link, second, 11.0)
    acked(link, third, 12.0)
    assert link.speed.at(12.0) == pytest.approx(1500, rel=0.05)


def test_a_messager_s_node_has_its_name_and_incarnation() -> None:
    assert node_of(messager_of(PeerId("d0#1a"))) == "d0#1a"
