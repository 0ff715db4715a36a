"""Frames' bytes: out of one pool, into another, whatever the blocks' places and the parts' borders."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_messager.links import Link, PayloadLink, SharedMemoryLink
from kvrelay.core.geometry import KVGeometry
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.messages.messager_to_messager import KVFrame

GEOMETRY = KVGeometry(num_layers=3, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32", model_digest="model")
LARGE = KVGeometry(num_layers=1, num_kv_heads=8, head_dim=128, block_size=32, dtype="float32", model_digest="model")
NUM_BLOCKS = 24

BLOCK_LISTS = st.permutations(range(NUM_BLOCKS)).flatmap(lambda ids: st.integers(1, NUM_BLOCKS).map(lambda n: ids[:n]))
SORTED_RUNS = st.tuples(st.integers(0, 10), st.integers(1, 10)).map(lambda run: list(range(run[0], sum(run))))


@pytest.fixture(scope="module", params=[GEOMETRY, LARGE], ids=["small blocks", "large blocks"])
def pools(request: pytest.FixtureRequest) -> Iterator[tuple[KVMemory, KVMemory]]:
    source, target = (KVMemory.create(request.param, NUM_BLOCKS) for _ in range(2))
    source.planes[:] = np.random.default_rng(5).integers(0, 255, source.planes.shape, np.uint8)
    yield source, target
    source.close()
    target.close()


def frame_of(pool: KVMemory, sources: list[int], targets: list[int]) -> KVFrame:
    """Return a frame of all layers but the first, if there are several."""
    layer = min(1, pool.geometry.num_layers - 1)
    num_layers = pool.geometry.num_layers - layer
    return KVFrame(
        request_id="a",
        epoch=1,
        layer=layer,
        first_block=0,
        target_block_ids=targets,
        source_block_ids=sources,
        num_bytes=len(targets) * num_layers * pool.geometry.layer_block_bytes,
        digest=0,
        num_layers=num_layers,
    )


def send(link: Link, frame: KVFrame) -> tuple[KVFrame, list[memoryview]]:
    digest, parts = link.read(frame, frame.source_block_ids)
    return msgspec.structs.replace(frame, digest=digest), parts


@given(sources=BLOCK_LISTS | SORTED_RUNS, targets=BLOCK_LISTS | SORTED_RUNS)
@pytest.mark.parametrize("kind", ["payload", "unchecked payload", "shm"])
def test_blocks_arrive_where_they_belong(
    pools: tuple[KVMemory, KVMemory], kind: str, sources: list[int], targets: list[int]
) -> None:
    source, target = pools
    count = min(len(sources), len(targets))
    sources, targets = sources[:count], targets[:count]
    target.planes[:] = 0
    if kind == "shm":
        frame, parts = send(SharedMemoryLink(source), frame_of(source, sources, targets))
        assert parts == []
        assert SharedMemoryLink(target, source).write(frame, ())
    else:
        frame, parts = send(PayloadLink(source, checksum=kind == "payload"), frame_of(source, sources, targets))
        assert sum(part.nbytes for part in parts) == frame.num_bytes
        assert (frame.digest != 0) == (kind == "payload")
        assert PayloadLink(target, checksum=True).write(frame, parts)
    assert np.array_equal(target.planes[frame.layer :, :, targets], source.planes[frame.layer :, :, sources])
    untouched = sorted(set(range(NUM_BLOCKS)) - set(targets))
    assert not target.planes[:, :, untouched].any()
    assert not target.planes[: frame.layer].any()


@given(data=st.data(), targets=BLOCK_LISTS)
def test_parts_may_be_cut_anywhere(pools: tuple[KVMemory, KVMemory], data: st.DataObject, targets: list[int]) -> None:
    source, target = pools
    target.planes[:] = 0
    frame, parts = send(PayloadLink(source, checksum=True), frame_of(source, targets, targets))
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    pieces = [memoryview(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert PayloadLink(target, checksum=True).write(frame, pieces)
    assert np.array_equal(target.planes[frame.layer :, :, targets], source.planes[frame.layer :, :, targets])


def test_one_piece_is_sent_without_a_copy(pools: tuple[KVMemory, KVMemory]) -> None:
    source, _ = pools
    blocks = list(range(NUM_BLOCKS))
    frame, parts = send(PayloadLink(source, checksum=True), frame_of(source, blocks, blocks))
    assert len(parts) == 2 * frame.num_layers
    assert all(np.shares_memory(np.frombuffer(part, np.uint8), source.planes) for part in parts)


def test_corrupt_payload_is_not_written(pools: tuple[KVMemory, KVMemory]) -> None:
    source, target = pools
    target.planes[:] = 0
    frame, parts = send(PayloadLink(source, checksum=True), frame_of(source, [1, 2], [1, 2]))
    flipped = bytes([parts[0][0] ^ 1]) + bytes(parts[0][1:])
    assert not PayloadLink(target, checksum=True).write(frame, [memoryview(flipped), *parts[1:]])
    assert not target.planes.any()


def test_blocks_that_change_while_they_are_read_are_noticed(pools: tuple[KVMemory, KVMemory]) -> None:
    source, target = pools
    frame, _ = send(SharedMemoryLink(source), frame_of(source, [1, 2], [3, 4]))
    source.planes[frame.layer, 1, 2, -1] ^= 1
    assert not SharedMemoryLink(target, source).write(frame, ())
    source.planes[frame.layer, 1, 2, -1] ^= 1


def test_nothing_is_copied_from_a_pool_that_is_not_mapped(pools: tuple[KVMemory, KVMemory]) -> None:
    source, target = pools
    frame, parts = send(PayloadLink(source, checksum=True), frame_of(source, [1], [1]))
    assert not SharedMemoryLink(target).write(frame, ())
    assert not SharedMemoryLink(target, source).write(frame, parts)
