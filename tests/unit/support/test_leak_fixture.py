"""The leak fixture itself: each kind of leak is seen, and a test that cleans up is not blamed."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import zmq
from support import leaks
from support.leaks import Belongings

from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry


@contextmanager
def child() -> Iterator[None]:
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        yield
        process.kill()


@contextmanager
def thread() -> Iterator[None]:
    end = threading.Event()
    worker = threading.Thread(target=end.wait, name="forgotten")
    worker.start()
    yield
    end.set()
    worker.join()


@contextmanager
def plain_socket() -> Iterator[None]:
    with socket.socket():
        yield


@contextmanager
def zmq_socket() -> Iterator[None]:
    context = zmq.Context()
    held = context.socket(zmq.DEALER)
    yield
    held.close(0)
    context.term()


@contextmanager
def kv_memory() -> Iterator[None]:
    memory = KVMemory.create(KVGeometry(1, 1, 8, 4, "uint8", "model"), num_blocks=2)
    yield
    memory.close()


@contextmanager
def shm_file(name: str) -> Iterator[None]:
    path = Path("/dev/shm") / name
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def own_shm_file() -> AbstractContextManager[None]:
    return shm_file(f"kvrelay-test-{os.getpid()}")


def shm_file_of_an_ended_child() -> AbstractContextManager[None]:
    with subprocess.Popen(["/bin/true"]) as process:
        pass
    return shm_file(f"kvrelay-{process.pid}")


@contextmanager
def runtime_file() -> Iterator[None]:
    path = Path(os.environ["XDG_RUNTIME_DIR"]) / "messager.ipc"
    path.touch()
    yield
    path.unlink()


LEAKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "process ": child,
    "thread forgotten": thread,
    "descriptor socket": plain_socket,
    "descriptor anon_inode:[eventfd": zmq_socket,
    "memfd:kvrelay-kv": kv_memory,
    "file /dev/shm/kvrelay-test-": own_shm_file,
    "file /dev/shm/kvrelay-": shm_file_of_an_ended_child,
    "messager.ipc": runtime_file,
}


@pytest.mark.parametrize(
    "name",
    [
        f"psm_{os.getpid()}",
        f"sem.kvrelay-{os.getpid()}",
        f"torch_{os.getpid()}_kvrelay",
        "kvrelay-test-1",
    ],
    ids=["python", "semaphore", "library", "another run of the tests"],
)
def test_files_of_other_programs_in_shared_memory_are_no_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)
    before = Belongings.now()
    with shm_file(name):
        assert before.leaked() == []


@pytest.mark.parametrize("told", LEAKS)
def test_each_kind_of_leak_is_seen_while_it_lasts(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.0)
    before = Belongings.now()
    with LEAKS[told]():
        leaked = before.leaked()
    assert [name for name in leaked if told in name], leaked
    monkeypatch.undo()
    assert before.leaked() == []
