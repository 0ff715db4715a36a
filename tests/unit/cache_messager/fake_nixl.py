"""NIXL's part in one process: memory, writes and notices of agents that know each other, and what can go wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

from cache_messager.links.nixl.agent import Agent
from kvrelay.errors import TransferError


class FakeWrite:
    """Copies its bytes when its peer makes progress. ``error``: it has failed."""

    def __init__(self, source: int, target: int, num_bytes: int, notice: bytes) -> None:
        self.source = source
        self.target = target
        self.num_bytes = num_bytes
        self.notice = notice
        self.has_arrived = False
        self.is_released = False
        self.error: str | None = None
        self.claims_done = False

    def is_done(self) -> bool:
        assert not self.is_released
        if self.error is not None:
            raise TransferError(self.error)
        return self.has_arrived or self.claims_done

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


class FakeAgent:
    """``incoming``: writes that arrive with the next ``notices``, unless it ``is_frozen``.

    ``damage``: called with each write after its bytes have arrived.
    """

    def __init__(self, fabric: Fabric, name: str) -> None:
        self.name = name
        self.is_frozen = False
        self.incoming: list[FakeWrite] = []
        self.damage: Callable[[FakeWrite], None] = lambda _: None
        self.refuses_writes = False
        self._fabric = fabric
        self._peers: set[str] = set()
        self._registered: list[range] = []

    def register(self, address: int, num_bytes: int) -> bytes:
        self._registered.append(range(address, address + num_bytes))
        return self.name.encode()

    def connect(self, metadata: bytes) -> str:
        name = metadata.decode()
        if name not in self._fabric.agents:
            raise TransferError(f"no agent {name}")
        self._peers.add(name)
        return name

    def disconnect(self, peer: str) -> None:
        self._peers.remove(peer)

    def write(self, source: int, target: int, num_bytes: int, peer: str, notice: bytes) -> FakeWrite:
        assert peer in self._peers
        if self.refuses_writes:
            raise TransferError("no route")
        other = self._fabric.agents[peer]
        assert self._has(source, num_bytes)
        assert other._has(target, num_bytes)
        write = FakeWrite(source, target, num_bytes, notice)
        other.incoming.append(write)
        return write

    def _has(self, address: int, num_bytes: int) -> bool:
        return any(address in known and address + num_bytes - 1 in known for known in self._registered)

    def notices(self) -> list[bytes]:
        return list(self._arrivals())

    def _arrivals(self) -> Iterator[bytes]:
        while self.incoming and not self.is_frozen:
            write = self.incoming.pop(0)
            ctypes.memmove(write.target, write.source, write.num_bytes)
            write.has_arrived = True
            self.damage(write)
            yield write.notice


class Fabric:
    """All agents by name."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}

    def create_agent(self) -> Agent:
        name = f"agent {len(self.agents)}"
        self.agents[name] = FakeAgent(self, name)
        return self.agents[name]
