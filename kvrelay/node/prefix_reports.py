"""Reports of a node's prefix cache to the routers that route by it."""

from __future__ import annotations

from collections.abc import Iterable

from kvrelay.machine.contract import Log
from kvrelay.machine.outbox import Outbox
from kvrelay.protocol.block_hash import PREFIX_KEY_BYTES
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.node_to_router import PrefixCacheChanged, PrefixCacheReset
from kvstore.blocks.kv_cache import KVCache


class PrefixReports:
    """Sends each router that wants it the whole prefix cache once, then what changes.

    Costs nothing without such a router. A node without prefix caching reports nothing.
    """

    def __init__(self, kv: KVCache, outbox: Outbox) -> None:
        self._kv = kv
        self._outbox = outbox
        self._next_number: dict[PeerId, int] = {}

    def registered(self, router: PeerId, *, wanted: bool) -> None:
        """Begin anew with ``router``, which has just registered this node."""
        self._next_number.pop(router, None)
        if wanted and self._kv.prefix_caching:
            self._report_changes()  # to the others: the new one begins with the state after these
            self._kv.follow_changes()
            self._next_number[router] = 0
            self._send(router, PrefixCacheChanged(number=0, added=_keys(self._kv.published())))

    def reset(self, router: PeerId, reset: int) -> None:
        """Empty the prefix cache for ``router``, which calls that ``reset``, and say so at once to all who want it."""
        num_blocks = self._kv.clear()
        self._kv.take_changes()
        for other in self._next_number:
            self._send(other, PrefixCacheChanged(number=0, added=b""))
        self._outbox.send(router, PrefixCacheReset(reset=reset, num_blocks=num_blocks))
        self._outbox.do(Log("info", "prefix cache reset", {"router": router, "blocks": num_blocks}))

    def report(self, routers: Iterable[PeerId]) -> None:
        """Send what has changed to those of ``routers`` that want it, and forget all others."""
        if self._next_number:
            registered = set(routers)
            self._next_number = {router: n for router, n in self._next_number.items() if router in registered}
            self._report_changes()
            if not self._next_number:
                self._kv.ignore_changes()

    def _report_changes(self) -> None:
        added, removed = self._kv.take_changes()
        if added or removed:
            for router, number in self._next_number.items():
                self._send(router, PrefixCacheChanged(number=number, added=_keys(added), removed=_keys(removed)))

    def _send(self, router: PeerId, message: PrefixCacheChanged) -> None:
        self._next_number[router] = message.number + 1
        self._outbox.send(router, message)


def _keys(hashes: Iterable[bytes]) -> bytes:
    return b"".join([block_hash[:PREFIX_KEY_BYTES] for block_hash in hashes])
