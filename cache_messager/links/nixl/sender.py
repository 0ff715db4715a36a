"""The sending end of nixl links: gathers each frame in staging memory, then writes it to the peer's."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from cache_messager.links.interface import LinkHost
from cache_messager.links.nixl.agent import Agent, Write
from cache_messager.links.nixl.staging import NUM_SLOTS, Area, AreaHandle, Areas, Notice
from cache_messager.work import DeviceLost, FrameSent, LinkLost
from kvrelay.errors import DeviceError, PeerLostError, TransferError, TransferTimeoutError
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.messages.messager_to_messager import KVFrame


class _Job(NamedTuple):
    frame: KVFrame
    source_block_ids: list[BlockId]


class _Underway(NamedTuple):
    write: Write
    deadline_s: float


@dataclass(slots=True)
class _Session:
    """An open link. ``remote``: the peer's name in the library. ``writes``: by slot, which is the same at both ends."""

    remote: str
    source: Area
    target: AreaHandle
    queue: deque[_Job] = field(default_factory=deque)
    writes: dict[int, _Underway] = field(default_factory=dict)


class FrameWriter:
    """Open links of a sender. Each has staging memory of its own, so that a frozen peer delays no other's frames.

    A write that fails or takes longer than ``peer_timeout_s`` loses its link. A frame is sent to the peer as soon as
    its write has started. Used by one thread.
    """

    def __init__(self, host: LinkHost, agent: Agent, areas: Areas) -> None:
        self._host = host
        self._agent = agent
        self._areas = areas
        self._sessions: dict[PeerId, _Session] = {}

    @property
    def is_busy(self) -> bool:
        """Whether ``advance`` has something to do."""
        return any(session.queue or session.writes for session in self._sessions.values())

    def open(self, peer: PeerId, handle: bytes) -> None:
        """See KVLink."""
        self.leave(peer)
        try:
            target = msgspec.msgpack.decode(handle, type=AreaHandle)
            remote = self._agent.connect(target.metadata)
            self._sessions[peer] = _Session(remote, self._areas.take(), target)
        except (TransferError, msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
            self._host.post(LinkLost(peer, str(error)))

    def leave(self, peer: PeerId) -> None:
        """See KVLink: queued frames fail."""
        session = self._sessions.pop(peer, None)
        if session is None:
            return
        for job in session.queue:
            self._host.post(FrameSent(job.frame, PeerLostError(f"the link to {peer} is lost")))
        for release in [underway.write.release for underway in session.writes.values()]:
            with suppress(TransferError):  # the peer may be gone
                release()
        with suppress(TransferError):
            self._agent.disconnect(session.remote)
        self._areas.give_back(session.source)

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """See KVLink."""
        session = self._sessions.get(peer)
        if session is None:
            self._host.post(FrameSent(frame, PeerLostError(f"the link to {peer} is lost")))
        elif not 0 <= frame.slot < NUM_SLOTS or frame.num_bytes > min(
            self._areas.slot_bytes, session.target.slot_bytes
        ):
            self._host.post(FrameSent(frame, TransferError(f"slot {frame.slot} of {peer} cannot hold the frame")))
        else:
            session.queue.append(_Job(frame, source_block_ids))

    def advance(self, now: float) -> None:
        """Note which writes are done, and start at most one of each link."""
        for peer, session in list(self._sessions.items()):
            try:
                self._poll(session, now)
                self._start_one(peer, session, now)
            except TransferError as error:
                self.leave(peer)
                self._host.post(LinkLost(peer, error.message))

    def _poll(self, session: _Session, now: float) -> None:
        for slot, underway in list(session.writes.items()):
            if underway.write.is_done():
                underway.write.release()
                del session.writes[slot]
            elif now >= underway.deadline_s:
                raise TransferTimeoutError(f"a write took longer than {self._host.peer_timeout_s} s")

    def _start_one(self, peer: PeerId, session: _Session, now: float) -> None:
        """Start the first queued frame whose slot is free: that of a refused frame may still be read and written."""
        job = next((job for job in session.queue if job.frame.slot not in session.writes), None)
        if job is None:
            return
        frame, blocks = job
        staging = session.source.view(frame.slot, frame.num_bytes)
        try:
            frame = replace(frame, digest=self._host.pool.gather(frame.layers, blocks, staging))
        except DeviceError as error:
            session.queue.clear()
            self._host.post(DeviceLost(error.message))
            return
        write = self._write(session, frame)  # if it fails, the frame is still queued and ends with the link
        session.queue.remove(job)
        session.writes[frame.slot] = _Underway(write, now + self._host.peer_timeout_s)
        self._host.send(peer, frame)

    def _write(self, session: _Session, frame: KVFrame) -> Write:
        source, target = session.source.address_of(frame.slot), session.target.address_of(frame.slot)
        notice = msgspec.msgpack.encode(Notice(session.target.link_id, frame.slot, frame.digest))
        return self._agent.write(source, target, frame.num_bytes, session.remote, notice)
