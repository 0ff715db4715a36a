"""Frames' bytes: out of one pool, into another, whatever the blocks' places and the parts' borders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pools import Pool, make_pool, wrote
from support.ids import block_ids

from cache_messager.links import cuda, ipc, link_class
from cache_messager.links.interface import KVLink
from cache_messager.work import BlocksWritten
from kvrelay.errors import CorruptKVError, TransferError
from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId, PeerId, RequestId
from kvrelay.protocol.messages.messager_to_messager import KVFrame

GEOMETRY = KVGeometry(num_layers=3, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32", model_digest="model")
LARGE = KVGeometry(num_layers=1, num_kv_heads=8, head_dim=128, block_size=32, dtype="float32", model_digest="model")
NUM_BLOCKS = 24

BLOCK_LISTS = st.permutations(range(NUM_BLOCKS)).flatmap(lambda ids: st.integers(1, NUM_BLOCKS).map(lambda n: ids[:n]))
SORTED_RUNS = st.tuples(st.integers(0, 10), st.integers(1, 10)).map(lambda run: list(range(run[0], sum(run))))


@pytest.fixture(scope="module", params=[GEOMETRY, LARGE], ids=["small blocks", "large blocks"])
def geometry(request: pytest.FixtureRequest) -> KVGeometry:
    geometry: KVGeometry = request.param
    return geometry


@pytest.fixture(scope="module")
def pools(geometry: KVGeometry) -> Iterator[tuple[Pool, Pool]]:
    yield from _pools(geometry, False)


@pytest.fixture(scope="module")
def device_pools(geometry: KVGeometry) -> Iterator[tuple[Pool, Pool]]:
    yield from _pools(geometry, True)


def _pools(geometry: KVGeometry, on_device: bool) -> Iterator[tuple[Pool, Pool]]:
    source, target = (make_pool(geometry, NUM_BLOCKS, on_device=on_device) for _ in range(2))
    source.planes[:] = np.random.default_rng(5).integers(0, 255, source.planes.shape, np.uint8)
    wrote(source)
    yield source, target
    source.close()
    target.close()


def frame_of(pool: Pool, sources: list[BlockId], targets: list[BlockId]) -> KVFrame:
    """Return a frame of all layers but the first, if there are several."""
    layer = min(1, pool.geometry.num_layers - 1)
    num_layers = pool.geometry.num_layers - layer
    return KVFrame(
        request_id=RequestId("a"),
        epoch=1,
        layer=layer,
        first_block=0,
        target_block_ids=targets,
        source_block_ids=sources,
        num_bytes=len(targets) * num_layers * pool.geometry.layer_block_bytes,
        digest=0,
        num_layers=num_layers,
    )


class Host:
    """A messager that keeps what its links send and post."""

    def __init__(self, pool: Pool, *, checksum: bool = True) -> None:
        self.pool: KVPool = pool
        self.checksum = checksum
        self.peer_timeout_s = 5.0
        self.is_only_kind = True
        self.sent: list[tuple[KVFrame, list[memoryview]]] = []
        self.events: list[object] = []

    def send(self, peer: str, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        self.sent.append((frame, list(payload)))

    def post(self, event: object) -> None:
        self.events.append(event)


def send(kind: type[KVLink], host: Host, frame: KVFrame) -> tuple[KVFrame, list[memoryview]]:
    sources = frame.source_block_ids
    link = kind(host)
    link.send(PeerId("d0"), msgspec.structs.replace(frame, source_block_ids=[]), sources)
    link.close()  # the threads of a link end with their work
    return host.sent.pop()


def write(kind: type[KVLink], target: Pool, source: Pool, frame: KVFrame, payload: Sequence[memoryview]) -> object:
    """Return the error of the write, or None."""
    host, offer = Host(target), kind(Host(source)).offer()
    assert offer is not None
    link = kind(host)
    link.accept(1, offer)
    link.write(1, frame, tuple(payload))
    link.drop(1)
    link.close()
    (event,) = host.events
    assert isinstance(event, BlocksWritten)
    return event.error


@given(sources=BLOCK_LISTS | SORTED_RUNS, targets=BLOCK_LISTS | SORTED_RUNS)
@pytest.mark.parametrize("kind", ["payload", "unchecked payload", "shm", "cuda", "payload of devices"])
def test_blocks_arrive_where_they_belong(
    pools: tuple[Pool, Pool],
    device_pools: tuple[Pool, Pool],
    kind: str,
    sources: list[BlockId],
    targets: list[BlockId],
) -> None:
    source, target = device_pools if kind in ("cuda", "payload of devices") else pools
    count = min(len(sources), len(targets))
    sources, targets = sources[:count], targets[:count]
    target.planes[:] = 0
    if kind in ("shm", "cuda"):
        frame, parts = send(link_class(kind), Host(source), frame_of(source, sources, targets))
        assert parts == []
        assert write(link_class(kind), target, source, frame, ()) is None
    else:
        host = Host(source, checksum=kind != "unchecked payload")
        frame, parts = send(ipc.Link, host, frame_of(source, sources, targets))
        assert sum(part.nbytes for part in parts) == frame.num_bytes
        assert (frame.digest != 0) == (kind != "unchecked payload")
        assert write(ipc.Link, target, source, frame, parts) is None
    assert np.array_equal(target.planes[frame.layer :, :, targets], source.planes[frame.layer :, :, sources])
    untouched = sorted(set(range(NUM_BLOCKS)) - set(targets))
    assert not target.planes[:, :, untouched].any()
    assert not target.planes[: frame.layer].any()


@given(data=st.data(), targets=BLOCK_LISTS)
def test_parts_may_be_cut_anywhere(pools: tuple[Pool, Pool], data: st.DataObject, targets: list[BlockId]) -> None:
    source, target = pools
    target.planes[:] = 0
    frame, parts = send(ipc.Link, Host(source), frame_of(source, targets, targets))
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    pieces = [memoryview(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert write(ipc.Link, target, source, frame, pieces) is None
    assert np.array_equal(target.planes[frame.layer :, :, targets], source.planes[frame.layer :, :, targets])


def test_one_piece_is_sent_without_a_copy(pools: tuple[Pool, Pool]) -> None:
    source, _ = pools
    blocks = block_ids(*range(NUM_BLOCKS))
    frame, parts = send(ipc.Link, Host(source), frame_of(source, blocks, blocks))
    assert len(parts) == 2 * frame.num_layers
    assert all(np.shares_memory(np.frombuffer(part, np.uint8), source.planes) for part in parts)


def test_corrupt_payload_is_not_written(pools: tuple[Pool, Pool]) -> None:
    source, target = pools
    target.planes[:] = 0
    frame, parts = send(ipc.Link, Host(source), frame_of(source, block_ids(1, 2), block_ids(1, 2)))
    flipped = bytes([parts[0][0] ^ 1]) + bytes(parts[0][1:])
    error = write(ipc.Link, target, source, frame, [memoryview(flipped), *parts[1:]])
    assert isinstance(error, CorruptKVError)
    assert not target.planes.any()


@pytest.mark.parametrize("kind", ["shm", "cuda"])
def test_blocks_that_change_while_they_are_read_are_noticed(
    pools: tuple[Pool, Pool], device_pools: tuple[Pool, Pool], kind: str
) -> None:
    source, target = device_pools if kind == "cuda" else pools
    frame, _ = send(link_class(kind), Host(source), frame_of(source, block_ids(1, 2), block_ids(3, 4)))
    source.planes[frame.layer, 1, 2, -1] ^= 1
    assert isinstance(write(link_class(kind), target, source, frame, ()), CorruptKVError)
    source.planes[frame.layer, 1, 2, -1] ^= 1


def test_a_block_on_a_device_that_was_damaged_before_it_was_sent_is_noticed(device_pools: tuple[Pool, Pool]) -> None:
    source, target = device_pools
    source.planes[-1, 0, 2, 0] ^= 1
    frame, _ = send(cuda.Link, Host(source), frame_of(source, block_ids(1, 2), block_ids(3, 4)))
    assert isinstance(write(cuda.Link, target, source, frame, ()), CorruptKVError)
    source.planes[-1, 0, 2, 0] ^= 1
    frame, _ = send(cuda.Link, Host(source), frame_of(source, block_ids(1, 2), block_ids(3, 4)))
    assert write(cuda.Link, target, source, frame, ()) is None
    assert target.digest(frame.layers, block_ids(3, 4)) == frame.digest


@pytest.mark.parametrize("kind", ["shm", "cuda"])
def test_pools_of_different_memory_have_no_link_that_copies_between_them(
    pools: tuple[Pool, Pool], device_pools: tuple[Pool, Pool], kind: str
) -> None:
    sender, receiver = (device_pools, pools) if kind == "cuda" else (pools, device_pools)
    offer = link_class(kind)(Host(sender[0])).offer()
    assert offer is not None
    assert link_class(kind)(Host(receiver[0])).offer() is None
    with pytest.raises(TransferError, match="this node's pool is not"):
        link_class(kind)(Host(receiver[0])).accept(1, offer)


@pytest.mark.parametrize(
    ("kind", "change", "payload_bytes"),
    [
        ("shm", {}, 8),
        ("shm", {"source_block_ids": [1]}, 0),
        ("shm", {"source_block_ids": [1, NUM_BLOCKS]}, 0),
        ("shm", {"source_block_ids": [-1, 1]}, 0),
        ("cuda", {}, 8),
        ("cuda", {"source_block_ids": [1]}, 0),
        ("cuda", {"source_block_ids": [1, NUM_BLOCKS]}, 0),
        ("cuda", {"source_block_ids": [-1, 1]}, 0),
        ("ipc", {}, 8),
        ("ipc", {}, 0),
    ],
)
def test_frames_that_are_not_of_the_kind_of_the_link_are_refused(
    pools: tuple[Pool, Pool],
    device_pools: tuple[Pool, Pool],
    kind: str,
    change: dict[str, object],
    payload_bytes: int,
) -> None:
    source, target = device_pools if kind == "cuda" else pools
    target.planes[:] = 0
    frame = msgspec.structs.replace(frame_of(source, block_ids(1, 2), block_ids(3, 4)), **change)
    payload = [memoryview(bytes(payload_bytes))] if payload_bytes else []
    error = write(link_class(kind), target, source, frame, payload)
    assert type(error) is TransferError
    assert "broke the protocol" in error.message
    assert not target.planes.any()


@pytest.mark.parametrize("kind", ["", "interface", "payload", "..", "shm.Link", "os", "a" * 1000, "\0"])
def test_kinds_of_link_that_do_not_exist_are_refused(kind: str) -> None:
    with pytest.raises(ValueError):
        link_class(kind)
