"""What a pool remembers of its blocks."""

from support.ids import block_ids

from kvstore.blocks.block_history import MAX_BLOCK_IDS, MAX_OPERATIONS, BlockHistory
from kvstore.blocks.kv_cache import KVCache


def test_the_history_of_a_block_is_what_was_done_with_it() -> None:
    cache = KVCache(4)
    cache.history.now = 1.5
    blocks = cache.allocate(2)
    cache.history.now = 2.5
    cache.unpin(blocks)
    assert cache.history.of(1) == ["allocate at 1.500000", "unpin at 2.500000", "recycle at 2.500000"]
    assert cache.history.of(3) == []


def test_the_memory_of_a_history_is_bounded() -> None:
    history = BlockHistory()
    for number in range(2 * MAX_OPERATIONS):
        history.record("pin", block_ids(number % 2))
    assert len(history.of(0)) == MAX_OPERATIONS // 2
    history.record("unpin", block_ids(*range(MAX_BLOCK_IDS)))
    assert history.of(0) == ["unpin at 0.000000"]
    history.record("recycle", block_ids(*range(MAX_BLOCK_IDS + 1)))
    assert history.of(0) == [], "an operation on more blocks than there is room for is not remembered"
    assert history.num_operations == 2 * MAX_OPERATIONS + 2
