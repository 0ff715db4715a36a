"""What a node reports of its prefix cache, and when it stops recording changes."""

from __future__ import annotations

from kvrelay.machine.contract import Send
from kvrelay.machine.outbox import Outbox
from kvrelay.node.prefix_reports import PrefixReports
from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES, BlockHasher
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.node_to_router import PrefixCacheChanged
from kvstore.blocks.kv_cache import KVCache

HASHER = BlockHasher("model", block_size=1)
ONE, OTHER = PeerId("router#1"), PeerId("router#2")


class Node:
    def __init__(self) -> None:
        self.kv = KVCache(8)
        self._outbox = Outbox()
        self.reports = PrefixReports(self.kv, self._outbox)

    def publish(self, *token_ids: int) -> list[bytes]:
        """Compute a prompt of one block per token and end it; return its prefix keys."""
        hashes, blocks = HASHER.hashes(token_ids), self.kv.allocate(len(token_ids))
        self.kv.publish(hashes, blocks)
        self.kv.unpin(blocks)
        return [block_hash[:PREFIX_KEY_BYTES] for block_hash in hashes]

    def sent(self) -> list[tuple[PeerId, int, bytes, bytes]]:
        """Return the reports sent since the last call: router, number, added and removed keys."""
        sends = [action for action in self._outbox.take() if isinstance(action, Send)]
        return [
            (send.peer, send.message.number, send.message.added, send.message.removed)
            for send in sends
            if isinstance(send.message, PrefixCacheChanged)
        ]


def test_a_router_gets_everything_once_and_then_changes() -> None:
    node = Node()
    first = node.publish(1, 2)
    node.reports.registered(ONE, wanted=True)
    ((router, number, added, removed),) = node.sent()
    assert (router, number, removed) == (ONE, 0, b"")
    assert {added[:PREFIX_KEY_BYTES], added[PREFIX_KEY_BYTES:]} == set(first)
    node.reports.report([ONE])
    assert node.sent() == []
    (key,) = node.publish(7)
    node.reports.report([ONE])
    assert node.sent() == [(ONE, 1, key, b"")]


def test_a_second_router_begins_where_the_first_one_is() -> None:
    node = Node()
    node.reports.registered(ONE, wanted=True)
    node.sent()
    (key,) = node.publish(7)
    node.reports.registered(OTHER, wanted=True)
    assert node.sent() == [(ONE, 1, key, b""), (OTHER, 0, key, b"")]


def test_evicted_blocks_are_removed() -> None:
    node = Node()
    (key,) = node.publish(7)
    node.reports.registered(ONE, wanted=True)
    node.sent()
    node.kv.clear()
    node.reports.report([ONE])
    assert node.sent() == [(ONE, 1, b"", key)]


def test_nothing_is_recorded_before_a_router_asks_and_after_the_last_one_has_left() -> None:
    node = Node()
    node.reports.registered(ONE, wanted=False)
    node.publish(1)
    assert node.kv.take_changes() == ([], [])
    node.reports.registered(OTHER, wanted=True)
    node.reports.report([])
    node.publish(2)
    assert node.kv.take_changes() == ([], [])
    assert node.sent()[1:] == []
