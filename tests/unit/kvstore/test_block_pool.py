"""The free list and the reference counts."""

import pytest
from support.ids import block_ids

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.laws import PART_BLOCKS, all_violations
from kvrelay.protocol.ids import BlockId
from kvstore.blocks.block_pool import FREE, BlockPool


def state(pool: BlockPool) -> tuple[int, list[int], int, int]:
    counts = [pool.ref_count(BlockId(block)) for block in range(pool.num_blocks)]
    return pool.num_free, counts, pool.num_allocated, pool.num_recycled


def test_allocated_blocks_have_one_reference_and_are_consecutive() -> None:
    pool = BlockPool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(0) == []
    assert pool.allocate(2) == [3, 4]
    assert state(pool) == (3, [1, 1, 1, 1, 1, FREE, FREE, FREE], 5, 0)


def test_blocks_come_back_in_runs_of_consecutive_ids() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(4), pool.allocate(4)
    pool.recycle(pool.unpin(second))
    pool.recycle(pool.unpin(first))
    assert pool.allocate(8) == [*first, *second]


def test_pin_returns_the_blocks_that_had_no_reference() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.unpin(blocks[:2])
    assert pool.pin(blocks) == blocks[:2]
    assert [pool.ref_count(block) for block in blocks] == [1, 1, 2]


def test_unpin_returns_the_blocks_that_lost_their_last_reference_last_block_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.pin(blocks[1:2])
    assert pool.unpin(blocks) == [2, 0]
    assert pool.num_free == 1, "nothing is free before it is recycled"
    assert pool.unpin(blocks[1:2]) == [1]


@pytest.mark.parametrize("num_blocks", [-1, 5])
def test_more_than_there_is_cannot_be_allocated(num_blocks: int) -> None:
    pool = BlockPool(4)
    with pytest.raises(LocalProtocolError, match=f"allocate {num_blocks} blocks: 4 of 4 are free"):
        pool.allocate(num_blocks)
    assert pool.num_free == 4


@pytest.mark.parametrize(
    ("operation", "blocks", "message"),
    [
        ("pin", [0, 3], "pin: block 3 is free"),
        ("unpin", [0, 3], "unpin: block 3 is free"),
        ("unpin", [0, 2], "unpin: block 2 has no references and is kept by the prefix cache"),
        ("recycle", [2, 3], "recycle: block 3 is free"),
        ("recycle", [2, 1], "recycle: block 1 has 2 references"),
        ("recycle", [2, 0], "recycle: block 0 has 1 reference$"),
        ("pin", [0, 4], "pin: no such block in a pool of 4: 4"),
        ("unpin", [0, -1], "unpin: no such block in a pool of 4: -1"),
        ("pin", [0, 1, 0], "pin: block 0 is named twice"),
        ("unpin", [1, 0, 1], "unpin: block 1 is named twice"),
        ("recycle", [2, 2], "recycle: block 2 is named twice"),
    ],
)
def test_misuse_is_told_and_changes_nothing(operation: str, blocks: list[BlockId], message: str) -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    pool.pin(block_ids(1))
    pool.unpin(block_ids(2))
    before = state(pool)
    with pytest.raises(LocalProtocolError, match=message):
        getattr(pool, operation)(blocks)
    assert state(pool) == before
    assert all_violations(pool.laws()) == []


def violations(pool: BlockPool) -> list[str]:
    return [violation.text for violation in all_violations(pool.laws())]


def test_violations_are_found() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    pool._free += block_ids(0, 3)
    assert violations(pool) == [
        "block 0 is on the free list but has 1 reference",
        "the free list names 1 blocks more than once",
        "2 allocated - 0 recycled != 0 blocks off the free list",
    ]
    pool._free.clear()
    assert "block 2 is counted free but not on the free list" in violations(pool)
    pool.num_referenced = 3
    assert "3 blocks are counted referenced, 2 are" in violations(pool)


def test_a_check_has_parts_of_bounded_size() -> None:
    pool = BlockPool(5 * PART_BLOCKS)
    pool._ref_counts[4 * PART_BLOCKS] = 0
    parts = list(pool.laws())
    assert len(parts) == 11, "five of the free list, five of the blocks, and the totals"
    assert sum(map(len, parts)) == 1
