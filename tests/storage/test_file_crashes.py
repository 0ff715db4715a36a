"""kill -9 of writers to a ``file`` store, at any moment: no torn block is ever served, and the store goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from file_lives import content_of
from storage_rooms import GEOMETRY, HASHES, TIMEOUT_S, FileRoom, HandClock, planes, views
from support.loops import run

from kvstore.storage.file_store import FileBackend
from kvstore.storage.interface import PutOutcome
from kvstore.storage.store import Store

NUM_DEATHS = 20
NUM_BLOCKS = 500
"""Fewer than there are hashes, so that writers evict."""


class Writer:
    """The process that forks writers, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pid: int | None = None

    def begin(self, path: Path, seed: int, fatal: int = 0, share: float = 0.0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path} {NUM_BLOCKS} {seed} {fatal} {share}\n".encode())
        self._process.stdin.flush()
        self._pid = int(self._read_until(b"\n"))

    def wait_for_put(self) -> None:
        self._read_until(b".")

    def kill(self) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self.wait_for_death()

    def wait_for_death(self) -> None:
        self._read_until(b"dead\n")
        self._pid = None

    def _read_until(self, end: bytes) -> bytes:
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(end):
            said += self._process.stdout.read(1) or pytest.fail(f"the writers ended: {said!r}")
        return said


@contextmanager
def forking() -> Iterator[Writer]:
    script = Path(__file__).with_name("file_lives.py")
    env = {**os.environ, "PYTHONPATH": f"{script.parent}{os.pathsep}{script.parents[1]}"}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        writer = Writer(process)
        try:
            yield writer
        finally:
            writer.kill()


@pytest.fixture
def writer() -> Iterator[Writer]:
    with forking() as found:
        yield found


async def check_all(path: Path) -> int:
    """Read every block from the store at ``path``; return how many there are."""
    store = FileRoom(path).store(num_blocks=NUM_BLOCKS)
    await store.open()
    pool = planes(len(HASHES), None)
    hits = await store.get(HASHES, views(pool))
    for index, hit in enumerate(hits):
        expected = content_of(HASHES[index])[:, :, 0] if hit else np.zeros(1, np.uint8)
        assert (pool[:, :, index] == expected).all()
    assert store.counters.corrupt_blocks == 0
    await store.close()
    return sum(hits)


def test_writer_dies_in_the_middle_of_a_write(writer: Writer, tmp_path: Path) -> None:
    rng = random.Random(0)
    for death in range(NUM_DEATHS):
        writer.begin(tmp_path, death, rng.randrange(1, 400), rng.random())
        writer.wait_for_death()
        run(check_all(tmp_path))
    run(check_nothing_is_lost(tmp_path))


def test_writer_is_killed_at_any_moment(writer: Writer, tmp_path: Path) -> None:
    rng, found = random.Random(1), 0
    for death in range(NUM_DEATHS):
        writer.begin(tmp_path, death)
        for _ in range(rng.randrange(30)):
            writer.wait_for_put()
        writer.kill()
        found = run(check_all(tmp_path))
    assert found > NUM_BLOCKS // 2
    run(check_nothing_is_lost(tmp_path))


async def check_nothing_is_lost(path: Path) -> None:
    """Slots that dead writers reserved are used again after a while."""
    clock = HandClock()
    clock.now_s = 4e9
    capacity = 4096 + NUM_BLOCKS * (4096 + 64)
    store = Store(FileBackend(GEOMETRY, path, capacity, TIMEOUT_S, clock), GEOMETRY, TIMEOUT_S, clock)
    await store.open()
    num_slots = ((await store.stats()).capacity_bytes or 0) // 4096
    for start in range(0, len(HASHES), 50):
        block_hashes = HASHES[start : start + 50]
        outcomes = await store.put(block_hashes, [content_of(one)[:, :, 0] for one in block_hashes])
        assert PutOutcome.FAILED not in outcomes
    assert (await store.stats()).num_blocks == num_slots
    assert (await store.verify()).num_corrupt == 0
    await store.close()


def test_two_processes_write_and_evict_while_this_one_reads(writer: Writer, tmp_path: Path) -> None:
    with forking() as other:
        writer.begin(tmp_path, 0)
        other.begin(tmp_path, 1)
        for _ in range(10):
            writer.wait_for_put()
            other.wait_for_put()
            run(check_all(tmp_path))
    writer.kill()
    assert run(check_all(tmp_path)) > NUM_BLOCKS // 2
