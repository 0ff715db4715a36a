"""The KV blocks of one node for its state machine: block pool and prefix cache in one object.

Use::

    matched = cache.match(hashes)                       admission: no side effects
    if cache.can_allocate(n, matched):                  no side effects
        cache.pin(matched)                              first pin, then allocate: pinned blocks cannot be evicted
        block_table = matched + cache.allocate(n)
    cache.publish(hashes[:k], block_table[:k])          the first k blocks are computed (P) or verified (D)
    cache.pin(block_ids)                                a copy to the store's staging memory begins
    cache.unpin(block_ids)                              the copy is done
    cache.unpin(block_table)                            the request has ended and nothing uses its blocks any more
    cache.withdraw(hashes)                              a block of it is damaged: the next request computes it anew
    cache.clear()                                       so does every request from now on
    cache.keep_back(block_ids)                          blocks with KV from another node that has cleared its cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.laws import Laws, Violation, parts_of, require
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.block_history import BlockHistory
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.kv_event_log import KVEventLog
from kvstore.blocks.prefix_cache import PrefixCache

_MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """Totals since the start; they never decrease.

    ``prefix_queries`` counts requests. Blocks are allocated from the free list, recycled to it, and evicted from the
    prefix cache when free blocks are needed.
    """

    prefix_queries: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    allocated_blocks: int
    recycled_blocks: int
    evicted_blocks: int


class KVCache:
    """``num_blocks`` KV blocks, each free, evictable or used (see the package).

    Misuse raises LocalProtocolError with the block and the reason, and changes nothing: pinning a free block, returning
    a reference that is not held, an unknown block, allocating more blocks than are available. A lack of blocks is
    reported by ``can_allocate``, not by an exception. Without ``prefix_caching`` nothing is published or matched.
    """

    __slots__ = (
        "_evicted",
        "_hit_tokens",
        "_pool",
        "_prefixes",
        "_queries",
        "_query_tokens",
        "_withdrawn",
        "prefix_caching",
    )

    def __init__(self, num_blocks: int, prefix_caching: bool = True) -> None:
        self.prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._prefixes = PrefixCache(num_blocks)
        self._queries = 0
        self._query_tokens = 0
        self._hit_tokens = 0
        self._evicted = 0
        self._withdrawn: set[BlockId] = set()

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self._pool.num_free

    @property
    def num_evictable(self) -> int:
        """Published blocks that can be evicted."""
        return self._prefixes.num_evictable

    @property
    def num_used(self) -> int:
        """Blocks that are referenced, or whose continuation is referenced."""
        return self._pool.num_blocks - self._pool.num_free - self._prefixes.num_evictable

    @property
    def num_referenced(self) -> int:
        """Blocks with references: ``num_used`` without unreferenced blocks that a referenced one continues.

        If one request owns all of these, no other request has blocks that could be preempted for it.
        """
        return self._pool.num_referenced

    @property
    def stats(self) -> KVCacheStats:
        """The current totals."""
        return KVCacheStats(
            prefix_queries=self._queries,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            allocated_blocks=self._pool.num_allocated,
            recycled_blocks=self._pool.num_recycled,
            evicted_blocks=self._evicted,
        )

    def record_query(self, query_tokens: int, hit_tokens: int) -> None:
        """Count a request that asked for ``query_tokens`` and was served ``hit_tokens`` of them from the prefix cache.

        Apart from ``match``, which a waiting request repeats until it is admitted.
        """
        self._queries += 1
        self._query_tokens += query_tokens
        self._hit_tokens += hit_tokens

    def match(self, hashes: Sequence[bytes]) -> list[BlockId]:
        """Return the blocks of the longest published prefix of ``hashes``, to be pinned. No side effects."""
        return self._prefixes.match(hashes)

    def can_allocate(self, num_blocks: int, matched: Sequence[BlockId] = ()) -> bool:
        """Return whether ``allocate(num_blocks)`` would succeed once ``matched`` is pinned. No side effects."""
        deficit = num_blocks - self._pool.num_free
        if deficit <= 0:
            return True
        return deficit <= self._prefixes.num_evictable - self._prefixes.count_evictable(matched)

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Return ``num_blocks`` blocks with one reference each, evicting just as many as are not free.

        Raises LocalProtocolError, having evicted nothing, if free and evictable blocks together do not suffice.
        """
        deficit = num_blocks - self._pool.num_free
        if deficit > 0:
            self._evict(num_blocks, deficit)
        return self._pool.allocate(num_blocks)

    def _evict(self, num_blocks: int, deficit: int) -> None:
        if deficit > self._prefixes.num_evictable:
            raise LocalProtocolError(
                f"allocate {num_blocks} blocks: of {self.num_blocks}, {self.num_free} are free, "
                f"{self.num_evictable} evictable, {self.num_used} used"
            )
        self._recycle(self._prefixes.evict(deficit))
        self._evicted += deficit

    def pin(self, block_ids: Sequence[BlockId]) -> None:
        """Add one reference to each block. Evictable blocks become used, and most recently used.

        Raises LocalProtocolError if a block is free, unknown, or named twice.
        """
        self._prefixes.hold(self._pool.pin(block_ids))

    def unpin(self, block_ids: Sequence[BlockId]) -> None:
        """Remove one reference from each block. A block without references becomes free, or evictable if published.

        Raises LocalProtocolError if a block has no reference, is unknown, or is named twice.
        """
        self._recycle(self._prefixes.release(self._pool.unpin(block_ids)))

    def publish(self, hashes: Sequence[bytes], block_ids: Sequence[BlockId], token_ids: Sequence[int] = ()) -> None:
        """Make a sequence's first blocks matchable: ``block_ids[i]``, computed or verified, has hash ``hashes[i]``.

        ``token_ids`` are the sequence's, as many as fill the blocks or more; only events need them.

        Always from the sequence's first block on; what is published already costs nothing. A hash that another
        block has published keeps that block: the duplicate stays its request's own and is freed with it, and the blocks
        after it continue the chain of the old one. Blocks that were withdrawn, and those after them, are not published.

        Raises LocalProtocolError if a block is not referenced, or is published with another hash, or if the
        two lists differ in length.
        """
        if len(hashes) != len(block_ids):
            raise LocalProtocolError(f"publish: {len(hashes)} hashes for {len(block_ids)} blocks")
        if not self.prefix_caching:
            return
        if self._withdrawn:
            num_sound = next((i for i, block in enumerate(block_ids) if block in self._withdrawn), len(block_ids))
            hashes, block_ids = hashes[:num_sound], block_ids[:num_sound]
        num_settled = self._prefixes.num_settled(hashes, block_ids)
        self._pool.require("publish", block_ids[num_settled:], min_refs=1)
        self._prefixes.insert(hashes, block_ids, num_settled, token_ids)

    def withdraw(self, hashes: Sequence[bytes]) -> None:
        """Match nothing of this sequence any more, nor of others that begin as it does: one of its blocks is damaged.

        Referenced blocks remain with their requests, and are never published again. Looks at the whole tree.
        """
        if hashes:
            removed = self._prefixes.remove(hashes[0])
            self._withdrawn.update(removed)
            self._recycle([block for block in removed if not self._pool.ref_count(block)])

    def clear(self) -> int:
        """Match nothing any more of what there is now; return how many blocks were published.

        Referenced blocks remain with their requests, and are never published again. Looks at every block.
        """
        removed = self._prefixes.clear()
        self._withdrawn.update(self._pool.referenced())
        self._recycle([block for block in removed if not self._pool.ref_count(block)])
        return len(removed)

    def keep_back(self, block_ids: Sequence[BlockId]) -> None:
        """Never publish these blocks while they are referenced, as they are now.

        Raises LocalProtocolError if one is not.
        """
        self._pool.require("keep back", block_ids, min_refs=1)
        self._withdrawn.update(block_ids)

    def may_be_published(self, block_ids: Sequence[BlockId]) -> bool:
        """Return whether none of these referenced blocks was withdrawn, cleared or kept back."""
        return not self._withdrawn or self._withdrawn.isdisjoint(block_ids)

    def _recycle(self, blocks: list[BlockId]) -> None:
        self._pool.recycle(blocks)
        if self._withdrawn:
            self._withdrawn.difference_update(blocks)

    # ------------------------------------------------------------ for routers and subscribers

    def follow_changes(self) -> None:
        """Record what is published and removed from now on, for ``take_changes``."""
        if self._prefixes.changes is None:
            self._prefixes.changes = {}

    def ignore_changes(self) -> None:
        """Record nothing any more, and drop what is recorded."""
        self._prefixes.changes = None

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes published and those removed since the last call, without what came and went between."""
        changes = self._prefixes.changes or {}
        if changes:
            self._prefixes.changes = {}
        published = [block_hash for block_hash, is_published in changes.items() if is_published]
        return published, [block_hash for block_hash, is_published in changes.items() if not is_published]

    def log_events(self, block_size: int) -> KVEventLog:
        """Log every change from now on, for subscribers; the log begins with an event that says that there is nothing.

        To be called before anything is published.
        """
        self._prefixes.events = log = KVEventLog(block_size)
        log.cleared()
        return log

    def published(self) -> list[bytes]:
        """Return the hashes of all published blocks. Looks at every block."""
        return self._prefixes.published()

    @property
    def history(self) -> BlockHistory:
        """What was last done with the blocks."""
        return self._pool.history

    def laws(self) -> Laws:
        """Check all blocks, whether or not anybody holds them; see ``kvrelay.machine.laws``."""
        yield from self._pool.laws()
        yield from self._prefixes.laws(lambda block: self._pool.ref_count(block) > 0)
        for part in parts_of(self.num_blocks):
            found = []
            for block in map(BlockId, part):
                refs, published = self._pool.ref_count(block), self._prefixes.is_published(block)
                if refs < 0 and published:
                    found.append(Violation(f"block {block} is free and published", block))
                if refs == 0 and not published:
                    text = f"block {block} is lost: neither free, nor published, nor referenced"
                    found.append(Violation(text, block))
            yield found

    def laws_at_rest(self) -> Laws:
        """Check that nobody holds a block, and that free and evictable blocks are all there are."""
        if self._pool.num_referenced:
            yield self._referenced()
        if self.num_free + self.num_evictable != self.num_blocks:
            text = f"{self.num_free} free and {self.num_evictable} evictable blocks are not all {self.num_blocks}"
            yield [Violation(text)]

    def _referenced(self) -> list[Violation]:
        referenced = self._pool.referenced()
        shown = ", ".join(f"block {block} {self._pool.describe(block)}" for block in referenced[:_MAX_SHOWN])
        text = f"{len(referenced)} of {self.num_blocks} KV blocks are still referenced: {shown}"
        return [Violation(text + (", ..." if len(referenced) > _MAX_SHOWN else ""), next(iter(referenced), None))]

    def assert_quiescent(self) -> None:
        """Raise LocalProtocolError with the referenced blocks if there are any."""
        require(self.laws_at_rest(), "KV blocks at rest")

    def check_invariants(self) -> None:
        """Raise LocalProtocolError with all inconsistencies. Checks everything at once."""
        require(self.laws(), "KV blocks")
