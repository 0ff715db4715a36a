"""The kernel that copies blocks between pools, or to and from staging memory, and digests what it reads.

It takes addresses as integers: a pool of another process is no tensor of any framework here.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kvrelay.kv_pool import block_digest

_PLACE_FACTOR = tl.constexpr(block_digest.PLACE_FACTOR)
_FACTOR_1 = tl.constexpr(block_digest.MIX_FACTORS[0])
_FACTOR_2 = tl.constexpr(block_digest.MIX_FACTORS[1])
_SHIFT = tl.constexpr(block_digest.MIX_SHIFT)
_MASK = tl.constexpr(block_digest.MIX_MASK)

_RUNTIME = [
    *("source", "target", "sources", "targets", "digests", "count"),
    *("source_plane", "target_plane", "source_blocks", "target_blocks"),
]


@triton.jit
def _mix(words):
    """``block_digest._mix``."""
    words = (words ^ ((words >> _SHIFT) & _MASK)) * _FACTOR_1
    words = (words ^ ((words >> _SHIFT) & _MASK)) * _FACTOR_2
    return words ^ ((words >> _SHIFT) & _MASK)


@triton.jit(do_not_specialize=_RUNTIME)
def move_blocks_kernel(
    source, target, sources, targets, digests, count, source_plane, target_plane, source_blocks, target_blocks,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Block ``program_id(0)`` of the lists in plane ``program_id(1)`` from the first planes on; see ``move_blocks``."""
    place = tl.program_id(0)
    row = tl.program_id(1)
    block = tl.load(sources.to(tl.int64).to(tl.pointer_type(tl.int32)) + place).to(tl.int64)
    offset = ((source_plane + row).to(tl.int64) * source_blocks + block) * WORDS
    read_from = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int64)) + offset, ALIGNED)
    write_to = read_from
    if COPY:
        block = tl.load(targets.to(tl.int64).to(tl.pointer_type(tl.int32)) + place).to(tl.int64)
        offset = ((target_plane + row).to(tl.int64) * target_blocks + block) * WORDS
        write_to = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.int64)) + offset, ALIGNED)
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, WORDS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WORDS
        words = tl.load(read_from + column, mask=inside, other=0)
        if COPY:
            tl.store(write_to + column, words, mask=inside)
        mixed = _mix(words ^ ((column.to(tl.int64) + 1) * _PLACE_FACTOR))
        total += tl.where(inside, mixed, 0)
    where = digests.to(tl.int64).to(tl.pointer_type(tl.int64)) + row.to(tl.int64) * count + place
    tl.store(where, tl.sum(total))


class Place(NamedTuple):
    """Blocks ``[planes, num_blocks, words]`` at ``address``, of which planes from ``first_plane`` on are meant.

    ``block_ids`` is the address of int32 block numbers.
    """

    address: int
    num_blocks: int
    first_plane: int
    block_ids: int


def move_blocks(
    source: Place, target: Place | None, digests: int, num_planes: int, num_blocks: int, num_words: int
) -> None:
    """Copy the blocks of ``source`` to those of ``target``, if there is one, in the current stream.

    ``digests``: the address of int64 [num_planes, num_blocks] for those of what was read. All addresses are ones that
    the device reaches, pinned host memory too.
    """
    into = source if target is None else target
    move_blocks_kernel[(num_blocks, num_planes)](
        source.address, into.address, source.block_ids, into.block_ids, digests, num_blocks,
        source.first_plane, into.first_plane, source.num_blocks, into.num_blocks,
        WORDS=num_words, BLOCK=min(1024, triton.next_power_of_2(num_words)), ALIGNED=8 if num_words % 2 else 16,
        COPY=target is not None, num_warps=4,
    )  # fmt: skip
