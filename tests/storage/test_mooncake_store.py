"""The ``mooncake`` backend without its library, and with a master that comes and goes."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from subprocess import PIPE
from typing import Any

import pytest
from mooncake_master import CAPACITY_BYTES, MooncakeMaster
from storage_rooms import GEOMETRY, HASHES, HandClock, planes, views
from support.ipv6 import needs_ipv6
from support.loops import run

from kvrelay.config.storage import StorageConfig
from kvrelay.errors import StorageError, StorageUnavailableError
from kvstore.storage.factory import make_store
from kvstore.storage.interface import KVStore, PutOutcome
from kvstore.storage.store import PAUSE_S

WRITTEN, FAILED = PutOutcome.WRITTEN, PutOutcome.FAILED


def store_at(address: str, clock: HandClock | None = None, host: str = "127.0.0.1") -> KVStore:
    config = StorageConfig(backend="mooncake", master=address, capacity=CAPACITY_BYTES, timeout_s=15.0)
    return make_store(config, GEOMETRY, clock or HandClock(), host)


def test_without_the_library_the_store_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    async def check() -> None:
        monkeypatch.setattr(importlib, "import_module", missing)
        with pytest.raises(StorageError, match="libibverbs"):
            await store_at("127.0.0.1:1").open()

    run(check())


NODE = """
import asyncio, sys
from storage_rooms import HASHES, planes, views
from test_mooncake_store import WRITTEN, store_at

async def main():
    store = store_at(sys.argv[2], host="::1")
    await store.open()
    if sys.argv[1] == "writer":
        assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
        print("written", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    else:
        pool = planes(2, None)
        assert await store.get(HASHES[:2], views(pool)) == [True] * 2
        assert (pool == planes(2)).all()
    await store.close()

asyncio.run(main())
"""


@needs_ipv6
def test_nodes_that_have_only_ipv6_addresses(mooncake: MooncakeMaster | str) -> None:
    if isinstance(mooncake, str):
        pytest.skip(mooncake)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    master = MooncakeMaster("::1")
    try:
        master.start()
        command = [sys.executable, "-c", NODE]
        with subprocess.Popen([*command, "writer", master.address], stdin=PIPE, stdout=PIPE, env=environment) as writer:
            assert writer.stdout is not None
            assert any(b"written" in line for line in writer.stdout)
            assert subprocess.run([*command, "reader", master.address], env=environment, check=False).returncode == 0
            writer.communicate()
        assert writer.returncode == 0
    finally:
        master.kill()


def test_a_master_that_is_started_after_the_store_and_killed(mooncake: MooncakeMaster | str) -> None:
    if isinstance(mooncake, str):
        pytest.skip(mooncake)

    async def check() -> None:
        clock, master = HandClock(), MooncakeMaster()
        store = store_at(master.address, clock)
        await store.open()
        pool = planes(2, None)
        assert await store.get(HASHES[:2], views(pool)) == [False] * 2
        assert store.counters.errors == 1
        try:
            await asyncio.to_thread(master.start)
            clock.now_s += PAUSE_S
            assert await store.put(HASHES[:2], views(planes(2))) == [WRITTEN] * 2
            assert await store.get(HASHES[:2], views(pool)) == [True] * 2
            assert (pool == planes(2)).all()
        finally:
            await asyncio.to_thread(master.kill)
        assert await store.get(HASHES[:2], views(planes(2))) == [False] * 2
        assert await store.put(HASHES[:2], views(planes(2))) == [FAILED] * 2
        assert (store.counters.errors, store.counters.skipped) == (2, 1)
        with pytest.raises(StorageUnavailableError):
            await store.stats()
        await store.close()

    run(check())
