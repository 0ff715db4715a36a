"""The receiving end of nixl links: peers write frames to staging memory, from where they are written to the pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cache_messager.links.interface import LinkHost
from cache_messager.links.nixl.agent import Agent
from cache_messager.links.nixl.staging import NUM_SLOTS, Area, Areas, Notice
from cache_messager.work import BlocksWritten, DeviceLost, corrupt, violation
from kvrelay.errors import DeviceError, PeerLostError, TransferError, TransferTimeoutError
from kvrelay.protocol.messages.messager_to_messager import KVFrame


class _Awaited(NamedTuple):
    frame: KVFrame
    deadline_s: float


@dataclass(slots=True)
class _Incoming:
    """An accepted link. ``arrived``: digest of each slot's last notice. ``awaited``: frames without their bytes."""

    area: Area
    arrived: dict[int, int] = field(default_factory=dict)
    awaited: list[_Awaited] = field(default_factory=list)


class FrameReader:
    """Accepted links of a receiver. A peer can write to its link's area only, never to the pool. Used by one thread.

    A frame waits for its notice. A peer that dies or freezes sends none: its frames end when the link is dropped, or at
    the deadline, which is later than the sender's own, so that the sender has lost the link by then.
    """

    def __init__(self, host: LinkHost, agent: Agent, areas: Areas) -> None:
        self._host = host
        self._agent = agent
        self._areas = areas
        self._links: dict[int, _Incoming] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a frame waits for its bytes."""
        return any(link.awaited for link in self._links.values())

    @property
    def has_links(self) -> bool:
        """Whether a peer may write, which may progress only in ``advance``."""
        return bool(self._links)

    def accept(self, link_id: int) -> bytes:
        """See KVLink."""
        area = self._areas.take()
        self._links[link_id] = _Incoming(area)
        return msgspec.msgpack.encode(area.handle(link_id))

    def drop(self, link_id: int) -> None:
        """See KVLink: awaited frames fail."""
        link = self._links.pop(link_id)
        for awaited in link.awaited:
            self._host.post(BlocksWritten(link_id, awaited.frame, PeerLostError("the link is lost")))
        self._areas.give_back(link.area)

    def write(self, link_id: int, frame: KVFrame, now: float) -> None:
        """See KVLink."""
        link = self._links[link_id]
        if 0 <= frame.slot < NUM_SLOTS and frame.num_bytes <= self._areas.slot_bytes:
            link.awaited.append(_Awaited(frame, now + 2 * self._host.peer_timeout_s))
        else:
            problem = f"{frame.num_bytes} bytes in slot {frame.slot} of a nixl link"
            self._host.post(BlocksWritten(link_id, frame, violation("the sender", problem)))

    def advance(self, now: float) -> None:
        """Take notices, and write the frames that have arrived."""
        try:
            for notice in self._agent.notices():
                self._take(notice)
        except TransferError as error:
            self._end_all(error)
        for link_id, link in self._links.items():
            for awaited in list(link.awaited):
                frame = awaited.frame
                if link.arrived.get(frame.slot) == frame.digest:
                    link.awaited.remove(awaited)
                    self._write(link_id, link.area, frame)
                elif now >= awaited.deadline_s:
                    link.awaited.remove(awaited)
                    late = TransferTimeoutError("the bytes of a frame did not arrive")
                    self._host.post(BlocksWritten(link_id, frame, late))

    def _take(self, notice: bytes) -> None:
        try:
            link_id, slot, digest = msgspec.structs.astuple(msgspec.msgpack.decode(notice, type=Notice))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return  # no link sends such a notice; a frame that waits for it fails when its time is over
        link = self._links.get(link_id)
        if link is not None:
            link.arrived[slot] = digest

    def _end_all(self, error: TransferError) -> None:
        for link_id, link in self._links.items():
            for awaited in link.awaited:
                self._host.post(BlocksWritten(link_id, awaited.frame, error))
            link.awaited.clear()

    def _write(self, link_id: int, area: Area, frame: KVFrame) -> None:
        """Write the blocks and verify the pool's, because a sender that has lost the link may write to a slot again."""
        pool = self._host.pool
        try:
            pool.write(frame.layers, frame.target_block_ids, [area.view(frame.slot, frame.num_bytes)])
            is_intact = pool.digest(frame.layers, frame.target_block_ids) == frame.digest
        except DeviceError as error:
            self._host.post(DeviceLost(error.message))
            return
        self._host.post(BlocksWritten(link_id, frame, None if is_intact else corrupt(frame)))
