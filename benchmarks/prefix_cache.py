"""Cost of the prefix cache: matching a long prompt, and evicting blocks from small and large trees.

    python benchmarks/prefix_cache.py

Three tables:

1. Matching a prompt of 8,192 tokens that is cached, hashing included, in trees of 10^4 to 10^6 blocks. Aim: under 1 ms.
2. Evicting 10,000 blocks from the same trees, all full, by ``KVCache.allocate``. Aim: cost per block flat within 2x.
   The baselines do the same work on the same tree: ``one by one`` is this cache, asked to evict and recycle each block
   by itself; ``heap`` keeps leaves and free list in heaps and recycles each block as it is found, ``heap, batch`` the
   same with one recycling after the loop; ``re-sort`` sorts the leaves again for each block (measured on fewer blocks).
3. Every operation of ``KVCache`` on a prompt of 512 blocks, per block.

Times are the best of several rounds; a round's order of eviction is random over chains.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache

TREE_SIZES = (10_000, 100_000, 1_000_000)
NUM_FREED = 10_000
NUM_RESORTED = 100
CHAIN_BLOCKS = 50
SHARED_BLOCKS = 10
CHAINS_PER_SHARED = 25
BLOCK_SIZE = 16
PROMPT_TOKENS = 8_192
ROUNDS = 5


class Stopwatch:
    """``with watch:`` keeps the shortest time seen."""

    best_s = float("inf")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.best_s = min(self.best_s, time.perf_counter() - start)


@dataclass
class Chains:
    """Made-up hashes of ``num_blocks`` blocks: chains that share their first blocks in groups, as chats of one system
    prompt do."""

    num_blocks: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __iter__(self) -> Iterator[list[bytes]]:
        left, shared = self.num_blocks, list[bytes]()
        for number in range(self.num_blocks):
            if number % CHAINS_PER_SHARED == 0:
                shared = self.hashes(min(left, SHARED_BLOCKS))
                left -= len(shared)
            own = self.hashes(min(left, CHAIN_BLOCKS - SHARED_BLOCKS))
            left -= len(own)
            yield shared + own
            if not left:
                return

    def hashes(self, count: int) -> list[bytes]:
        return [self.rng.randbytes(32) for _ in range(count)]


def insert(cache: KVCache, hashes: list[bytes]) -> None:
    """Serve one request as a node does."""
    matched = cache.match(hashes)
    cache.pin(matched)
    block_table = matched + cache.allocate(len(hashes) - len(matched))
    cache.publish(hashes, block_table)
    cache.unpin(block_table)


def touch(cache: KVCache, hashes: list[bytes]) -> None:
    matched = cache.match(hashes)
    cache.pin(matched)
    cache.unpin(matched)


# ---------------------------------------------------------------- baselines


class HeapTree:
    """The usual prefix tree: leaves in a heap by last use, free blocks in a heap by id."""

    def __init__(self, cache: KVCache) -> None:
        """Copy the tree of ``cache``, in which everything is evictable."""
        tree = cache._prefixes
        self.parent_of = tree._parent_of[:]
        self.hash_of = tree._hash_of[: cache.num_blocks]
        self.block_of = {block_hash: block for block, block_hash in enumerate(self.hash_of)}
        self.last_used = {block: use for use, block in enumerate(tree._evictable)}
        self.num_children = [0] * (cache.num_blocks + 1)
        for block in self.last_used:
            self.num_children[self.parent_of[block]] += 1
        self.root = cache.num_blocks
        self.leaves = [(use, block) for block, use in self.last_used.items() if not self.num_children[block]]
        heapq.heapify(self.leaves)
        self.free: list[BlockId] = []

    def remove(self, block: BlockId) -> BlockId | None:
        """Take ``block`` out; return its parent if that is a leaf now."""
        del self.block_of[self.hash_of[block]]
        self.hash_of[block] = b""
        parent = self.parent_of[block]
        self.num_children[parent] -= 1
        return parent if parent != self.root and not self.num_children[parent] else None

    def recycle(self, block_ids: list[BlockId]) -> None:
        if len(block_ids) > 1:
            self.free += block_ids
            heapq.heapify(self.free)
            return
        for block in block_ids:
            heapq.heappush(self.free, block)

    def free_one_by_one(self, num_blocks: int) -> None:
        for _ in range(num_blocks):
            _, block = heapq.heappop(self.leaves)
            parent = self.remove(block)
            if parent is not None:
                heapq.heappush(self.leaves, (self.last_used[parent], parent))
            self.recycle([block])

    def free_batched(self, num_blocks: int) -> None:
        freed: list[BlockId] = []
        for _ in range(num_blocks):
            _, block = heapq.heappop(self.leaves)
            parent = self.remove(block)
            if parent is not None:
                heapq.heappush(self.leaves, (self.last_used[parent], parent))
            freed.append(block)
        self.recycle(freed)

    def free_resorting(self, num_blocks: int) -> None:
        for _ in range(num_blocks):
            self.leaves.sort(reverse=True)
            _, block = self.leaves.pop()
            parent = self.remove(block)
            if parent is not None:
                self.leaves.append((self.last_used[parent], parent))
            self.recycle([block])


def free_one_by_one(cache: KVCache, num_blocks: int) -> None:
    for _ in range(num_blocks):
        cache._pool.recycle(cache._prefixes.evict(1))
    cache._pool.allocate(num_blocks)


# ---------------------------------------------------------------- measurements


@dataclass
class Freeing:
    """Seconds per block."""

    batch: float
    one_by_one: float
    heap: float
    heap_batch: float
    resort: float


def full_cache(num_blocks: int) -> tuple[KVCache, list[list[bytes]]]:
    """Return a cache without a free block, last used in random order, and its chains."""
    cache, chains = KVCache(num_blocks), list(Chains(num_blocks))
    for hashes in chains:
        insert(cache, hashes)
    random.Random(1).shuffle(chains)
    for hashes in chains:
        touch(cache, hashes)
    assert (cache.num_free, cache.num_evictable) == (0, num_blocks)
    return cache, chains


def refill(cache: KVCache, chains: list[list[bytes]]) -> None:
    """Publish again what was evicted, until no block is free."""
    for hashes in chains:
        if len(cache.match(hashes)) < len(hashes):
            insert(cache, hashes)
    assert cache.num_free == 0


def measure_freeing(cache: KVCache, chains: list[list[bytes]]) -> Freeing:
    batch, one_by_one = Stopwatch(), Stopwatch()
    for _ in range(ROUNDS):
        for watch, free in ((batch, KVCache.allocate), (one_by_one, free_one_by_one)):
            with watch():
                taken = free(cache, NUM_FREED)
            cache.unpin(taken or cache._pool.referenced())
            refill(cache, chains)

    def baseline(free: Callable[[HeapTree, int], None], num_blocks: int, rounds: int) -> float:
        watch = Stopwatch()
        for _ in range(rounds):
            tree = HeapTree(cache)
            with watch():
                free(tree, num_blocks)
        return watch.best_s / num_blocks

    return Freeing(
        batch=batch.best_s / NUM_FREED,
        one_by_one=one_by_one.best_s / NUM_FREED,
        heap=baseline(HeapTree.free_one_by_one, NUM_FREED, 2),
        heap_batch=baseline(HeapTree.free_batched, NUM_FREED, 2),
        resort=baseline(HeapTree.free_resorting, NUM_RESORTED, 1),
    )


@dataclass
class Matching:
    """Seconds per prompt."""

    hashing: float
    matching: float
    both: float


def measure_matching(cache: KVCache) -> Matching:
    hasher = BlockHasher("model digest", BLOCK_SIZE)
    rng = random.Random(2)
    hashing, matching, both = Stopwatch(), Stopwatch(), Stopwatch()
    for _ in range(8 * ROUNDS):
        token_ids = [rng.randrange(150_000) for _ in range(PROMPT_TOKENS)]
        insert(cache, hasher.hashes(token_ids))
        with hashing():
            hashes = hasher.hashes(token_ids)
        with matching():
            cache.match(hashes)
        with both():
            matched = cache.match(hasher.hashes(token_ids))
        assert len(matched) == PROMPT_TOKENS // BLOCK_SIZE
    return Matching(hashing.best_s, matching.best_s, both.best_s)


def measure_operations() -> dict[str, float]:
    """Return seconds per block of each operation on a prompt of 512 blocks."""
    num_blocks = PROMPT_TOKENS // BLOCK_SIZE
    cache, hashes = KVCache(2 * num_blocks), Chains(0).hashes(num_blocks)
    watches = {
        name: Stopwatch()
        for name in ("allocate", "publish", "publish again", "pin", "unpin", "unpin, last reference", "match")
    } | {"pin, first reference": Stopwatch(), "can_allocate": Stopwatch(), "allocate, all evicted": Stopwatch()}
    for _ in range(20 * ROUNDS):
        with watches["allocate"]():
            table = cache.allocate(num_blocks)
        for name, operation in (("publish", cache.publish), ("publish again", cache.publish)):
            with watches[name]():
                operation(hashes, table)
        for name, change in (("pin", cache.pin), ("unpin", cache.unpin), ("unpin, last reference", cache.unpin)):
            with watches[name]():
                change(table)
        with watches["match"]():
            matched = cache.match(hashes)
        with watches["can_allocate"]():
            cache.can_allocate(num_blocks + 1, matched)
        with watches["pin, first reference"]():
            cache.pin(matched)
        cache.unpin(matched)
        rest = cache.allocate(num_blocks)
        with watches["allocate, all evicted"]():
            table = cache.allocate(num_blocks)
        cache.unpin(table)
        cache.unpin(rest)
    return {name: watch.best_s / num_blocks for name, watch in watches.items()}


# ---------------------------------------------------------------- tables


def verdict(fine: bool) -> str:
    return "[green]met[/]" if fine else "[red]missed[/]"


def show_matching(console: Console, results: dict[int, Matching]) -> None:
    table = Table("blocks in tree", title=f"Match of a cached prompt of {PROMPT_TOKENS:,} tokens", title_justify="left")
    for heading in ("hashing ms", "match ms", "both ms", "ms allowed / ms", "aim: under 1 ms"):
        table.add_column(heading, justify="right")
    for num_blocks, result in results.items():
        milliseconds = [1e3 * result.hashing, 1e3 * result.matching, 1e3 * result.both]
        table.add_row(
            f"{num_blocks:,}",
            *(f"{value:.3f}" for value in milliseconds),
            f"{1 / milliseconds[2]:.1f}x",
            verdict(milliseconds[2] < 1),
        )
    console.print(table)


def show_freeing(console: Console, results: dict[int, Freeing]) -> None:
    table = Table("blocks in tree", title=f"Freeing {NUM_FREED:,} blocks, ns per block", title_justify="left")
    for heading in ("batch", "one by one", "heap", "heap, batch", "re-sort"):
        table.add_column(heading, justify="right")
    cheapest = min(result.batch for result in results.values())
    table.add_column("batch vs cheapest tree", justify="right")
    for num_blocks, result in results.items():
        others = (result.one_by_one, result.heap, result.heap_batch, result.resort)
        table.add_row(
            f"{num_blocks:,}",
            f"{1e9 * result.batch:.0f}",
            *(f"{1e9 * other:,.0f} ({other / result.batch:,.1f}x)" for other in others),
            f"{result.batch / cheapest:.2f}x",
        )
    console.print(table)
    spread = max(result.batch for result in results.values()) / cheapest
    console.print(f"cost per block over all trees within {spread:.2f}x, aim: within 2x: {verdict(spread <= 2)}\n")


def show_operations(console: Console, results: dict[str, float]) -> None:
    table = Table("operation", title="KVCache, 512 blocks at a time", title_justify="left")
    table.add_column("ns per block", justify="right")
    table.add_column("aim: 1 us or less", justify="right")
    for name, seconds in results.items():
        table.add_row(name, f"{1e9 * seconds:.0f}", verdict(seconds <= 1e-6))
    console.print(table)


def main() -> None:
    console = Console()
    matching: dict[int, Matching] = {}
    freeing: dict[int, Freeing] = {}
    for num_blocks in TREE_SIZES:
        cache, chains = full_cache(num_blocks)
        freeing[num_blocks] = measure_freeing(cache, chains)
        matching[num_blocks] = measure_matching(cache)
    show_matching(console, matching)
    show_freeing(console, freeing)
    show_operations(console, measure_operations())


if __name__ == "__main__":
    main()
