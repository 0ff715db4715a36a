"""``payload: owner``: hosts that come, go, move, forget, spoil and do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_rooms import HASHES, TIMEOUT_S, OwnerRoom, backend_of, planes, views
from support.loops import Inbox, run
from support.redis_server import RedisServer

from kvrelay.machine.contract import Received
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.store_to_store import BlocksDropped, BlocksFetched, DropBlocks, FetchBlocks
from kvrelay.runtime.transport import Transport
from kvstore.storage.interface import KVStore, PutOutcome

WRITTEN, PRESENT = PutOutcome.WRITTEN, PutOutcome.PRESENT
POLL_S = 0.05


@pytest.fixture
def hosts(tmp_path: Path, redis_one: RedisServer | None) -> OwnerRoom:
    if redis_one is None:
        pytest.skip("no redis-server here")
    return OwnerRoom(tmp_path, redis_one)


@asynccontextmanager
async def opened(hosts: OwnerRoom, number: int, timeout_s: float = TIMEOUT_S) -> AsyncIterator[KVStore]:
    store = hosts.host(number, timeout_s=timeout_s)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def hits(store: KVStore, count: int) -> list[int]:
    pool, expected = planes(count, None), planes(count)
    found = await store.get(HASHES[:count], views(pool))
    assert all((pool[:, :, index] == expected[:, :, index] * hit).all() for index, hit in enumerate(found))
    return [index for index, hit in enumerate(found) if hit]


async def address_of(store: KVStore) -> str:
    address = await backend_of(store)._address(backend_of(store)._owner)
    assert isinstance(address, str)
    return address


def test_a_sequence_whose_blocks_are_on_three_hosts(hosts: OwnerRoom) -> None:
    async def check() -> None:
        pool = planes(9)
        async with opened(hosts, 1) as first, opened(hosts, 2) as second, opened(hosts, 3) as third:
            for store, span in ((first, slice(0, 3)), (second, slice(3, 6)), (third, slice(6, 9))):
                assert await store.put(HASHES[span], views(pool)[span]) == [WRITTEN] * 3
            for store in (first, second, third):
                assert await store.longest_prefix(HASHES[:12]) == 9
                assert await hits(store, 12) == list(range(9))
                assert await store.put(HASHES[:9], views(pool)) == [PRESENT] * 9
                assert (await store.stats()).num_blocks == 9
            assert await second.delete(HASHES[:4]) == 4
            assert await hits(first, 9) == [4, 5, 6, 7, 8]
            assert await third.clear() == 5
            assert await hits(first, 9) == await hits(second, 9) == []

    run(check())


def test_a_host_that_starts_again_at_another_address(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader:
            async with opened(hosts, 2) as owner:
                await owner.put(HASHES[:3], views(planes(3)))
                before = await address_of(owner)
                assert await hits(reader, 3) == [0, 1, 2]
            async with opened(hosts, 2) as owner:
                assert await address_of(owner) != before
                assert await hits(reader, 3) == [0, 1, 2]

    run(check())


def test_a_host_nobody_knows_the_address_of(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            [gone] = await backend_of(reader)._link.run(
                [("DEL", backend_of(owner)._address_key(backend_of(owner)._owner))]
            )
            assert gone == 1
            assert await hits(reader, 3) == []
            assert (reader.counters.errors, reader.counters.timeouts) == (0, 0)
            await backend_of(owner)._announce(f"tcp://{backend_of(owner)._host}:1")

    run(check())


def test_a_host_that_does_not_answer_and_then_does(hosts: OwnerRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with opened(hosts, 1, timeout_s=3.0) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            hang = asyncio.Event()
            local = backend_of(owner)._local
            read_values = local.read_values

            async def late(block_hashes: Sequence[bytes]) -> Any:
                await hang.wait()
                return await read_values(block_hashes)

            monkeypatch.setattr(local, "read_values", late)
            assert await hits(reader, 3) == []
            assert reader.counters.errors == 1
            hang.set()
            while await hits(reader, 3) != [0, 1, 2]:  # noqa: ASYNC110 (on a busy machine an answer may be late)
                await asyncio.sleep(POLL_S)

    run(check())


def test_what_its_owner_lost_is_no_longer_said_to_be_there(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            await backend_of(owner)._local.delete([HASHES[1]])
            assert await reader.longest_prefix(HASHES[:3]) == 3
            assert await hits(reader, 3) == [0, 2]
            assert await reader.longest_prefix(HASHES[:3]) == 1
            await backend_of(owner)._local.delete([HASHES[2]])
            assert await hits(owner, 3) == [0]
            assert await hits(reader, 3) == [0]
            assert await reader.put(HASHES[:3], views(planes(3))) == [PRESENT, WRITTEN, WRITTEN]

    run(check())


def test_what_is_spoilt_at_its_owner_is_deleted_there(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            value = await hosts.read(owner, HASHES[1])
            value[-1] ^= 1
            await hosts.write(owner, HASHES[1], value)
            assert await hits(reader, 3) == [0, 2]
            assert owner.counters.corrupt_blocks == 1
            assert await backend_of(owner)._local.contains(HASHES[:3]) == [True, False, True]

    run(check())


@pytest.mark.parametrize("spoilt", ["a byte", "short", "too few"])
def test_what_is_spoilt_on_the_way_is_not_delivered(hosts: OwnerRoom, spoilt: str) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            values = [await hosts.read(owner, block_hash) for block_hash in HASHES[:3]]
            match spoilt:
                case "a byte":
                    values[1][-1] ^= 1
                case "short":
                    values[1] = values[1][:-1]
                case "too few":
                    del values[2]
            async with liar(values) as address:
                await backend_of(owner)._announce(address)
                assert await hits(reader, 3) == ([0, 1] if spoilt == "too few" else [0, 2])
            assert reader.counters.corrupt_blocks == (0 if spoilt == "too few" else 1)

    run(check())


@asynccontextmanager
async def liar(values: list[np.ndarray]) -> AsyncIterator[str]:
    """Answer every fetch with ``values``."""

    def answer(event: object) -> None:
        if isinstance(event, Received) and isinstance(event.message, FetchBlocks):
            fetched = BlocksFetched(fetch_id=event.message.fetch_id, found=[True] * len(event.message.block_hashes))
            transport.send(event.peer, fetched, [value.data for value in values])

    transport = Transport(PeerId("liar#1"), answer)
    [address] = transport.bind("tcp://127.0.0.1:0")
    try:
        yield address
    finally:
        transport.close()


def test_values_in_redis_that_are_none_of_ours(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 1) as reader, opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            backend = backend_of(owner)
            for junk in (b"", b"\xff", b"junk", b"tcp://", b"tcp://127.0.0.1:0", b"tcp://[::1:9", b"x" * 9999):
                await backend._link.run([("SET", backend._address_key(backend._owner), junk)])
                assert await hits(reader, 3) == []
                await backend._link.run(
                    [("SET", backend._key(HASHES[0]), junk), ("SET", backend._prefix + "junk", junk)]
                )
                assert await hits(reader, 3) == []
                assert (await reader.stats()).num_blocks == 3
                await backend._link.run([("SET", backend._key(HASHES[0]), backend._owner)])
            assert reader.counters.corrupt_blocks == 0
            await backend._announce(await address_of(reader))
            assert await reader.clear() == 0

    run(check())


def test_a_stranger_gets_nothing(hosts: OwnerRoom) -> None:
    async def check() -> None:
        async with opened(hosts, 2) as owner:
            await owner.put(HASHES[:3], views(planes(3)))
            namespace = backend_of(owner)._format.namespace
            inbox = Inbox()
            transport = Transport(PeerId("stranger#1"), inbox)
            transport.connect(PeerId("owner"), await address_of(owner))
            for asked, wanted in (
                (bytes(16), HASHES[:3]),
                (namespace, HASHES[:300]),
                (namespace, [b"short", HASHES[900]]),
            ):
                transport.send(PeerId("owner"), FetchBlocks(fetch_id=5, namespace=asked, block_hashes=wanted))
                answer = await inbox.next()
                assert isinstance(answer, Received)
                assert answer.message == BlocksFetched(fetch_id=5, found=[False] * len(wanted))
            transport.send(PeerId("owner"), DropBlocks(fetch_id=6, namespace=bytes(16), block_hashes=HASHES[:3]))
            answer = await inbox.next()
            assert isinstance(answer, Received)
            assert answer.message == BlocksDropped(fetch_id=6, num_blocks=0)
            transport.close()
            assert await hits(owner, 3) == [0, 1, 2]

    run(check())
