"""The part of the library NIXL that the link uses: registered memory, one-sided writes into it, and their notices."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kvrelay.errors import TransferError

_MODULES = ("nixl_cu13", "nixl_cu12")
"""The library's module in each of its wheels. Host memory needs no CUDA, so any of them will do."""

_BACKEND = "UCX"

RDMA_DEVICES = Path("/sys/class/infiniband")
"""Where Linux lists RDMA devices, RoCE ones included."""


class Write(Protocol):
    """A write that has been started."""

    def is_done(self) -> bool:
        """Return whether the library needs the source no more. Raises TransferError if the write has failed.

        Only the notice at the peer says that the bytes are there: a write to a dead peer may end as well.
        """

    def release(self) -> None:
        """Release the write. One that is not done may still read its source and write at the peer."""


class Agent(Protocol):
    """One end of one-sided writes. Used by one thread. All methods raise TransferError."""

    def register(self, address: int, num_bytes: int) -> bytes:
        """Register memory for writes from and to it; return the data that a peer needs to ``connect``."""

    def connect(self, metadata: bytes) -> str:
        """Prepare to write to memory that a peer has registered; return the peer's name."""

    def disconnect(self, peer: str) -> None:
        """Close the connection to ``peer``, with its writes."""

    def write(self, source: int, target: int, num_bytes: int, peer: str, notice: bytes) -> Write:
        """Start to copy registered bytes to a peer's address. ``notice`` arrives there after the bytes."""

    def notices(self) -> list[bytes]:
        """Return new notices of writes to this end. Incoming writes may only progress in this call."""


def reason_against() -> str | None:
    """Return why no agent can be created in this process, as far as that is known without loading the library."""
    return None if any(find_spec(name) for name in _MODULES) else "the library nixl is not installed"


def has_rdma() -> bool:
    """Return whether this host has an RDMA device. Without one the library writes over TCP, slower than ZMQ."""
    return RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())


def create_agent() -> Agent:
    """Load the library and create an agent, in about a second. Raises TransferError."""
    reason = reason_against()
    if reason is not None:
        raise TransferError(reason)
    with _library_errors():
        library = importlib.import_module(next(name for name in _MODULES if find_spec(name)))
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return _NixlAgent(library)


class _NixlAgent:
    def __init__(self, library: Any) -> None:
        # The library's own progress thread would keep a core busy.
        config = library.nixl_agent_config(enable_prog_thread=False, backends=[_BACKEND])
        self._agent = library.nixl_agent(os.urandom(8).hex(), config)
        if _BACKEND not in self._agent.backends:
            raise TransferError(f"NIXL has no backend {_BACKEND}")

    def register(self, address: int, num_bytes: int) -> bytes:
        with _library_errors():
            descriptors = self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM")
            metadata: bytes = self._agent.get_partial_agent_metadata(descriptors, True, [_BACKEND])
            return metadata

    def connect(self, metadata: bytes) -> str:
        with _library_errors():
            name: str | bytes = self._agent.add_remote_agent(metadata)
            return name.decode() if isinstance(name, bytes) else name

    def disconnect(self, peer: str) -> None:
        with _library_errors():
            self._agent.remove_remote_agent(peer)

    def write(self, source: int, target: int, num_bytes: int, peer: str, notice: bytes) -> Write:
        with _library_errors():
            ends = [self._agent.get_xfer_descs([(address, num_bytes, 0)], "DRAM") for address in (source, target)]
            handle = self._agent.initialize_xfer("WRITE", *ends, peer, notice)
            self._agent.transfer(handle)
            return _NixlWrite(self._agent, handle)

    def notices(self) -> list[bytes]:
        with _library_errors():
            return [notice for notices in self._agent.get_new_notifs().values() for notice in notices]


class _NixlWrite:
    def __init__(self, agent: Any, handle: Any) -> None:
        self._agent = agent
        self._handle = handle

    def is_done(self) -> bool:
        with _library_errors():
            state = self._agent.check_xfer_state(self._handle)
        if state == "ERR":
            raise TransferError("NIXL reports a failed write")
        return bool(state == "DONE")

    def release(self) -> None:
        with _library_errors():
            self._handle.release()


@contextmanager
def _library_errors() -> Iterator[None]:
    """Raise the library's errors, which have no common class of their own, as TransferError."""
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        raise TransferError(f"NIXL: {error}") from error
