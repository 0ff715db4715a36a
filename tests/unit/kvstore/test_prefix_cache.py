"""The radix tree by itself: order of eviction, holders, and what its own check finds."""

import pytest
from support.ids import block_ids

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.laws import all_violations
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.prefix_cache import PrefixCache


def chain(name: str) -> list[bytes]:
    """One made-up hash for each letter; like chained hashes, each names its whole prefix."""
    return [name[: end + 1].encode() for end in range(len(name))]


def publish(tree: PrefixCache, name: str, block_ids: list[BlockId]) -> None:
    tree.insert(chain(name), block_ids, tree.num_settled(chain(name), block_ids))


def violations(tree: PrefixCache, referenced: set[BlockId]) -> list[str]:
    return [violation.text for violation in all_violations(tree.laws(referenced.__contains__))]


def test_match_stops_at_the_first_block_that_is_not_published() -> None:
    tree = PrefixCache(8)
    publish(tree, "abc", block_ids(0, 1, 2))
    publish(tree, "abd", block_ids(0, 1, 3))
    assert tree.match(chain("abd")) == [0, 1, 3]
    assert tree.match(chain("abx")) == [0, 1]
    assert tree.match(chain("xbc")) == []


def test_num_settled_counts_up_to_the_last_block_published_under_its_own_hash() -> None:
    tree = PrefixCache(8)
    publish(tree, "ab", block_ids(0, 1))
    publish(tree, "abc", block_ids(5, 1, 2))
    assert tree.num_settled(chain("abcd"), block_ids(5, 1, 2, 3)) == 3
    assert tree.num_settled(chain("abcd"), block_ids(5, 6, 7, 3)) == 0, "duplicates are not published"
    assert tree.num_settled(chain("x"), block_ids(99)) == 0


def test_children_after_the_first_are_found_and_survive_it() -> None:
    tree = PrefixCache(8)
    publish(tree, "ab", block_ids(0, 1))
    publish(tree, "ac", block_ids(0, 2))
    publish(tree, "ad", block_ids(0, 3))
    tree.release(block_ids(1))
    assert tree.evict(1) == [1]
    assert tree.match(chain("ac")) == [0, 2]
    publish(tree, "ae", block_ids(0, 4))
    tree.release(block_ids(2))
    assert tree.evict(1) == [2]
    assert [tree.match(chain(name)) for name in ("ab", "ac", "ad", "ae")] == [[0], [0], [0, 3], [0, 4]]
    assert violations(tree, referenced=set(block_ids(0, 3, 4))) == []


def test_the_branch_unused_for_longest_goes_first_from_its_end() -> None:
    tree = PrefixCache(8)
    publish(tree, "abc", block_ids(0, 1, 2))
    publish(tree, "abd", block_ids(0, 1, 3))
    publish(tree, "x", block_ids(4))
    tree.release(block_ids(4))
    tree.release(block_ids(3))
    tree.release(block_ids(2, 1, 0))
    assert tree.evict(2) == [4, 3]
    assert tree.match(chain("abd")) == [0, 1]
    assert tree.evict(3) == [2, 1, 0], "each parent comes once, after its last child"
    assert tree.match(chain("abc")) == []
    assert violations(tree, referenced=set()) == []


def test_holding_a_block_again_makes_it_the_last_to_go() -> None:
    tree = PrefixCache(8)
    publish(tree, "ab", block_ids(0, 1))
    publish(tree, "xy", block_ids(2, 3))
    tree.release(block_ids(1, 0))
    tree.release(block_ids(3, 2))
    tree.hold(block_ids(0))
    tree.release(block_ids(0))
    assert tree.evict(4) == [1, 3, 2, 0]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_child_goes_before_its_parent_in_whatever_order_they_are_released(order: list[int]) -> None:
    tree = PrefixCache(4)
    publish(tree, "abc", block_ids(0, 1, 2))
    for block in order:
        tree.release(block_ids(block))
    assert violations(tree, referenced=set()) == []
    assert tree.evict(3) == [2, 1, 0]


def test_a_held_child_holds_its_parents() -> None:
    tree = PrefixCache(4)
    publish(tree, "abc", block_ids(0, 1, 2))
    tree.release(block_ids(2, 1, 0))
    tree.hold(block_ids(1))
    assert tree.num_evictable == 1
    assert tree.count_evictable(block_ids(0, 1, 2)) == 1
    assert violations(tree, referenced=set(block_ids(1))) == []
    with pytest.raises(LocalProtocolError, match="evict 2 blocks: 1 are evictable"):
        tree.evict(2)
    assert tree.evict(1) == [2]


def test_a_chain_published_below_an_evictable_block_holds_it() -> None:
    tree = PrefixCache(4)
    publish(tree, "ab", block_ids(0, 1))
    tree.release(block_ids(1, 0))
    publish(tree, "abc", block_ids(0, 1, 3))
    assert tree.num_evictable == 0
    assert tree.release(block_ids(3)) == []
    assert tree.evict(3) == [3, 1, 0]


def test_release_returns_what_is_not_published() -> None:
    tree = PrefixCache(4)
    publish(tree, "a", block_ids(0))
    assert tree.release(block_ids(3, 2, 0)) == [3, 2]
    assert tree.num_evictable == 1


def test_a_block_cannot_be_published_under_two_hashes() -> None:
    tree = PrefixCache(4)
    publish(tree, "ab", block_ids(0, 1))
    with pytest.raises(LocalProtocolError, match="block 1 is published as 6162 already, not as 7879"):
        publish(tree, "xy", block_ids(2, 1))
    assert tree.match(chain("xy")) == []
    assert violations(tree, referenced=set(block_ids(0, 1))) == []


def test_a_hash_that_repeats_in_one_sequence_is_refused() -> None:
    tree = PrefixCache(4)
    with pytest.raises(LocalProtocolError, match="comes twice"):
        tree.insert([b"a", b"b", b"a"], block_ids(0, 1, 2), 0)
    assert tree.match([b"a"]) == []


def test_violations_are_found() -> None:
    tree = PrefixCache(4)
    publish(tree, "abc", block_ids(0, 1, 2))
    assert violations(tree, referenced=set(block_ids(0, 1))) == [
        "block 2 has 1 holders, but 0 held children and no reference"
    ]
    tree.release(block_ids(2, 1, 0))
    tree._evictable.move_to_end(BlockId(2))
    assert violations(tree, referenced=set()) == ["evictable block 2 comes after its parent"]
    del tree._evictable[BlockId(2)]
    assert violations(tree, referenced=set()) == ["published block 2 is neither held nor evictable"]
    tree._hash_of[0] = b""
    assert violations(tree, referenced=set())[:3] == [
        "2 published blocks, but 3 children",
        "block 0 is evictable but not published",
        "published block 1 has an unpublished parent",
    ]
    tree._first_child[0] = BlockId(3)
    assert "published block 1 is not among its parent's children" in violations(tree, referenced=set())
