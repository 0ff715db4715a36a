"""KVCache: every rule of a block's life, told in requests."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
from support.ids import block_ids

from kvrelay.errors import LocalProtocolError
from kvrelay.protocol.block_hash import BlockHasher
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.kv_cache import KVCache

HASHER = BlockHasher("model", block_size=1)


def hashes_of(text: str) -> list[bytes]:
    """One block per letter."""
    return HASHER.hashes([ord(letter) for letter in text])


def run(cache: KVCache, text: str) -> list[BlockId]:
    """Serve ``text`` as a node does, up to the point where all its blocks are published; return its block table."""
    hashes = hashes_of(text)
    matched = cache.match(hashes)
    cache.pin(matched)
    block_table = matched + cache.allocate(len(text) - len(matched))
    cache.publish(hashes, block_table)
    return block_table


def counts(cache: KVCache) -> tuple[int, int, int]:
    cache.check_invariants()
    return cache.num_free, cache.num_evictable, cache.num_used


# ---------------------------------------------------------------- life of a block


def test_a_block_is_free_when_its_last_reference_is_gone() -> None:
    cache = KVCache(4)
    blocks = cache.allocate(3)
    cache.pin(blocks[:2])
    cache.unpin(blocks)
    assert counts(cache) == (2, 0, 2), "the request is gone, its transfer is not"
    cache.unpin(blocks[:2])
    assert counts(cache) == (4, 0, 0)


def test_a_published_block_without_references_is_evictable_and_matchable() -> None:
    cache = KVCache(4)
    blocks = run(cache, "abc")
    assert counts(cache) == (1, 0, 3)
    cache.unpin(blocks)
    assert counts(cache) == (1, 3, 0)
    assert cache.match(hashes_of("abcd")) == blocks


def test_nothing_matches_before_it_is_published() -> None:
    cache = KVCache(4)
    blocks = cache.allocate(3)
    assert cache.match(hashes_of("abc")) == []
    cache.publish(hashes_of("ab"), blocks[:2])
    assert cache.match(hashes_of("abc")) == blocks[:2]
    cache.publish(hashes_of("abc"), blocks)
    assert cache.match(hashes_of("abc")) == blocks


def test_publishing_changes_nobody_s_references() -> None:
    cache = KVCache(4)
    blocks = cache.allocate(2)
    before = counts(cache)
    cache.publish(hashes_of("ab"), blocks)
    cache.publish(hashes_of("ab"), blocks)
    assert counts(cache) == before


def test_a_pinned_block_outlives_pressure() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "abc"))
    matched = cache.match(hashes_of("ab"))
    cache.pin(matched)
    assert counts(cache) == (1, 1, 2)
    assert set(cache.allocate(2)).isdisjoint(matched)
    assert cache.match(hashes_of("abc")) == matched


def test_a_reader_of_the_end_keeps_the_whole_prefix() -> None:
    """A transfer sends only the blocks that D lacks, and may outlive its request."""
    cache = KVCache(4)
    blocks = run(cache, "abcd")
    cache.pin(blocks[2:3])
    cache.unpin(blocks)
    assert counts(cache) == (0, 1, 3)
    cache.unpin(blocks[2:3])
    assert counts(cache) == (0, 4, 0)


# ---------------------------------------------------------------- allocation and eviction


def test_can_allocate_has_no_side_effects() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "abc"))
    before = counts(cache), cache.stats
    assert cache.can_allocate(4)
    assert not cache.can_allocate(5)
    assert (counts(cache), cache.stats) == before
    assert len(cache.match(hashes_of("abc"))) == 3


def test_can_allocate_does_not_count_matched_blocks_as_evictable() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "abc"))
    matched = cache.match(hashes_of("abx"))
    assert cache.can_allocate(2, matched)
    assert not cache.can_allocate(3, matched)
    cache.pin(matched)
    assert len(cache.allocate(2)) == 2


def test_matched_blocks_that_are_in_use_anyway_cost_no_room() -> None:
    cache = KVCache(4)
    run(cache, "ab")
    assert cache.can_allocate(2, cache.match(hashes_of("ab")))


def test_allocate_evicts_just_the_deficit() -> None:
    cache = KVCache(5)
    cache.unpin(run(cache, "abcd"))
    cache.allocate(3)
    assert counts(cache) == (0, 2, 3)
    assert cache.stats.evicted_blocks == 2
    assert len(cache.match(hashes_of("abcd"))) == 2


def test_free_blocks_are_taken_before_anything_is_evicted() -> None:
    cache = KVCache(5)
    cache.unpin(run(cache, "abc"))
    cache.allocate(2)
    assert cache.stats.evicted_blocks == 0


def test_the_prefix_unused_for_longest_is_evicted_first() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "ab"))
    cache.unpin(run(cache, "xy"))
    cache.unpin(run(cache, "ab"))
    cache.allocate(2)
    assert cache.match(hashes_of("xy")) == []
    assert len(cache.match(hashes_of("ab"))) == 2


def test_matching_alone_does_not_touch_the_order() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "ab"))
    cache.unpin(run(cache, "xy"))
    cache.match(hashes_of("ab"))
    cache.allocate(2)
    assert cache.match(hashes_of("ab")) == []


def test_a_shared_parent_is_evicted_once_after_both_branches() -> None:
    cache = KVCache(4)
    tables = run(cache, "abc"), run(cache, "abd")
    for table in tables:
        cache.unpin(table)
    assert len(cache.allocate(3)) == 3
    assert len(cache.match(hashes_of("abc"))) == 1
    assert cache.allocate(1)
    assert counts(cache) == (0, 0, 4)


def test_blocks_keep_coming_in_consecutive_runs_after_eviction() -> None:
    cache = KVCache(8)
    cache.unpin(run(cache, "abcdefgh"))
    assert cache.allocate(4) == [4, 5, 6, 7]
    assert cache.allocate(4) == [0, 1, 2, 3]


def test_what_was_there_when_it_was_cleared_is_never_matched_again() -> None:
    cache = KVCache(7)
    mine = run(cache, "abc")
    cache.unpin(run(cache, "abd"))
    cache.unpin(run(cache, "x"))
    [unpublished] = cache.allocate(1)
    assert counts(cache) == (1, 2, 4)
    assert cache.clear() == 5
    assert counts(cache) == (3, 0, 4)
    cache.publish(hashes_of("abc"), mine)
    cache.publish(hashes_of("y"), [unpublished])
    assert cache.match(hashes_of("abc")) == cache.match(hashes_of("y")) == []
    assert cache.stats.evicted_blocks == 0, "nobody needed the blocks"
    cache.unpin([*mine, unpublished])
    assert counts(cache) == (7, 0, 0)
    assert len(run(cache, "abcdefg")) == len(cache.match(hashes_of("abcdefg"))) == 7


def test_blocks_that_are_kept_back_are_published_when_somebody_else_has_them() -> None:
    cache = KVCache(6)
    cache.unpin(run(cache, "a"))
    [shared] = cache.match(hashes_of("a"))
    cache.pin([shared])
    mine = [shared, *cache.allocate(2)]
    assert cache.may_be_published(mine)
    cache.keep_back(mine[1:])
    assert cache.may_be_published([shared])
    assert not cache.may_be_published(mine)
    cache.publish(hashes_of("abc"), mine)
    assert cache.match(hashes_of("abc")) == [shared]
    cache.unpin(mine)
    assert counts(cache) == (5, 1, 0)
    assert len(run(cache, "abcdef")) == len(cache.match(hashes_of("abcdef"))) == 6
    with pytest.raises(LocalProtocolError, match="keep back: block 5"):
        KVCache(6).keep_back(block_ids(5))


# ---------------------------------------------------------------- duplicates


def test_the_first_publisher_of_a_hash_keeps_it() -> None:
    cache = KVCache(8)
    old, new = cache.allocate(2), cache.allocate(2)
    cache.publish(hashes_of("ab"), old)
    cache.publish(hashes_of("ab"), new)
    assert cache.match(hashes_of("ab")) == old
    cache.unpin(new)
    assert counts(cache) == (6, 0, 2), "the duplicate was private to its request and goes with it"


def test_a_chain_continues_below_the_block_that_survived() -> None:
    cache = KVCache(8)
    old, new = cache.allocate(1), cache.allocate(3)
    cache.publish(hashes_of("a"), old)
    cache.publish(hashes_of("abc"), new)
    chain = [old[0], *new[1:]]
    assert cache.match(hashes_of("abc")) == chain
    cache.unpin(old)
    assert counts(cache) == (4, 0, 4), "the old block is unreferenced, but a referenced one continues it"
    assert cache.num_referenced == 3
    cache.unpin(new)
    assert counts(cache) == (5, 3, 0)
    assert cache.match(hashes_of("abc")) == chain
    assert len(cache.allocate(8)) == 8


def test_a_chain_may_continue_a_survivor_that_is_only_evictable() -> None:
    cache = KVCache(4)
    twin = cache.allocate(2)
    cache.unpin(run(cache, "a"))
    assert counts(cache) == (1, 1, 2)
    cache.publish(hashes_of("ab"), twin)
    assert counts(cache) == (1, 0, 3)
    cache.unpin(twin)
    assert counts(cache) == (2, 2, 0)


def test_a_duplicate_is_published_after_all_once_the_survivor_was_evicted() -> None:
    cache = KVCache(4)
    twin = cache.allocate(2)
    cache.unpin(run(cache, "a"))
    cache.publish(hashes_of("a"), twin[:1])
    cache.allocate(2)
    assert cache.match(hashes_of("a")) == []
    cache.publish(hashes_of("ab"), twin)
    assert cache.match(hashes_of("ab")) == twin


# ---------------------------------------------------------------- misuse


def test_misuse_is_told_and_changes_nothing() -> None:
    cache = KVCache(4)
    table = run(cache, "ab")
    cache.unpin(table)
    private = cache.allocate(1)
    before = counts(cache), cache.stats
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: cache.unpin(table), "unpin: block 0 has no references and is kept by the prefix cache"),
        (lambda: cache.unpin(block_ids(3)), "unpin: block 3 is free"),
        (lambda: cache.pin(block_ids(0, 3)), "pin: block 3 is free"),
        (lambda: cache.pin(block_ids(9)), "pin: no such block in a pool of 4: 9"),
        (lambda: cache.unpin([*private, *private]), "unpin: block 2 is named twice"),
        (lambda: cache.allocate(4), "allocate 4 blocks: of 4, 1 are free, 2 evictable, 1 used"),
        (lambda: cache.allocate(-1), "allocate -1 blocks"),
        (lambda: cache.publish(hashes_of("xy"), block_ids(2, 3)), "publish: block 3 is free"),
        (lambda: cache.publish(hashes_of("x"), block_ids(0)), "publish: block 0 has no references"),
        (lambda: cache.publish(hashes_of("xy"), private), "publish: 2 hashes for 1 blocks"),
    ]
    for misuse, message in cases:
        with pytest.raises(LocalProtocolError, match=message):
            misuse()
        assert (counts(cache), cache.stats) == before, message


def test_a_block_freed_twice_is_told() -> None:
    cache = KVCache(4)
    blocks = cache.allocate(2)
    cache.unpin(blocks)
    with pytest.raises(LocalProtocolError, match="unpin: block 0 is free"):
        cache.unpin(blocks)


def test_assert_quiescent_names_who_is_still_referenced() -> None:
    cache = KVCache(16)
    blocks = run(cache, "abcdefghij")
    cache.pin(blocks[:1])
    with pytest.raises(LocalProtocolError) as caught:
        cache.assert_quiescent()
    assert caught.value.message.startswith(
        "KV blocks at rest: 10 of 16 KV blocks are still referenced: block 0 has 2 references, block 1 has 1 reference,"
    )
    assert ", ...; 6 free and 0 evictable blocks are not all 16" in caught.value.message
    cache.unpin(blocks[:1])
    cache.unpin(blocks)
    cache.assert_quiescent()


def test_check_invariants_lists_every_contradiction() -> None:
    cache = KVCache(4)
    cache.unpin(run(cache, "a"))
    cache._prefixes.evict(1)
    cache._prefixes._hash_of[2] = b"nowhere"
    with pytest.raises(LocalProtocolError) as caught:
        cache.check_invariants()
    assert "block 0 is lost" in caught.value.message
    assert "block 2 is free and published" in caught.value.message
    assert "block 2 is not among its parent's children" in caught.value.message


# ---------------------------------------------------------------- the rest


def test_without_prefix_caching_nothing_is_matched_or_kept() -> None:
    cache = KVCache(4, prefix_caching=False)
    blocks = run(cache, "abc")
    assert cache.match(hashes_of("abc")) == []
    cache.unpin(blocks)
    assert counts(cache) == (4, 0, 0)


def test_stats_count_what_happened() -> None:
    cache = KVCache(4)
    cache.record_query(query_tokens=3, hit_tokens=0)
    cache.unpin(run(cache, "abc"))
    cache.record_query(query_tokens=4, hit_tokens=2)
    cache.unpin(run(cache, "abxy"))
    assert asdict(cache.stats) == {
        "prefix_queries": 2,
        "prefix_query_tokens": 7,
        "prefix_hit_tokens": 2,
        "allocated_blocks": 5,
        "recycled_blocks": 1,
        "evicted_blocks": 1,
    }


def test_forgotten_prefixes_are_computed_anew_by_whoever_comes_next() -> None:
    cache = KVCache(12)
    done, running = run(cache, "abc"), run(cache, "abd")
    other = run(cache, "xy")
    cache.unpin(done)
    cache.unpin(other)
    cache.withdraw(hashes_of("abc"))
    assert counts(cache) == (7, 2, 3), "block c is free, those of the running request are its own"
    assert cache.match(hashes_of("abc")) == []
    assert cache.match(hashes_of("xy")) == other
    again = run(cache, "abc")
    assert not set(again) & set(running)
    grown = [*running, *cache.allocate(1)]
    cache.publish(hashes_of("abde"), grown)
    assert cache.match(hashes_of("abd")) == again[:2], "a running request publishes no withdrawn block again"
    cache.unpin(grown)
    renewed = run(cache, "abde")
    assert set(renewed) & set(running), "the blocks are used again"
    assert cache.match(hashes_of("abde")) == renewed, "and then published"
    cache.check_invariants()
