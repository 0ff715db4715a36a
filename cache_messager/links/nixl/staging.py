"""Registered host memory in which frames are gathered and arrive."""

from __future__ import annotations

import mmap

import msgspec
import numpy as np

from cache_messager.links.nixl.agent import Agent

NUM_SLOTS = 16
"""Frames that an area holds."""


class AreaHandle(msgspec.Struct, frozen=True):
    """What a sender needs to write to an area of link ``link_id``. ``address``: of the first slot, at the receiver."""

    link_id: int
    metadata: bytes
    address: int
    slot_bytes: int

    def address_of(self, slot: int) -> int:
        """Return the address of a slot in the receiver's process."""
        return self.address + slot * self.slot_bytes


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """Follows the bytes of a frame: its payload with this digest is in the slot."""

    link_id: int
    slot: int
    digest: int


class Area:
    """Memory of NUM_SLOTS frames, of one end of one link. It takes physical memory as slots are used."""

    def __init__(self, agent: Agent, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._bytes = np.frombuffer(mmap.mmap(-1, NUM_SLOTS * slot_bytes), np.uint8)
        self.address = self._bytes.ctypes.data
        self._metadata = agent.register(self.address, self._bytes.nbytes)

    def handle(self, link_id: int) -> AreaHandle:
        """Return the handle for a sender."""
        return AreaHandle(link_id, self._metadata, self.address, self.slot_bytes)

    def address_of(self, slot: int) -> int:
        """Return the address of a slot in this process."""
        return self.address + slot * self.slot_bytes

    def view(self, slot: int, num_bytes: int) -> memoryview:
        """Return the first ``num_bytes`` of a slot."""
        first = slot * self.slot_bytes
        return self._bytes[first : first + num_bytes].data


class Areas:
    """Areas that are reused, and released only with the process.

    A write of a lost link may still read its source or, with a software transport, write to its target. In an area that
    serves another link, the digests notice it; in released memory nothing would.
    """

    def __init__(self, agent: Agent, slot_bytes: int) -> None:
        self._agent = agent
        self._spare: list[Area] = []
        self.slot_bytes = slot_bytes

    def take(self) -> Area:
        """Return an area that no link uses. Raises TransferError or OSError."""
        return self._spare.pop() if self._spare else Area(self._agent, self.slot_bytes)

    def give_back(self, area: Area) -> None:
        """Take back an area."""
        self._spare.append(area)
