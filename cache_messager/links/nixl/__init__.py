"""One-sided writes by the library NIXL (an extra), which uses RDMA or what else connects two hosts.

The sender gathers a frame's blocks in registered staging memory, because the library copies scattered blocks slowly. It
writes them to the frame's slot in the receiver's staging memory with a notice, and sends the frame. The receiver waits
for the notice, writes the blocks to its pool and verifies the digest there. A pool on a device is gathered into host
memory too. A thread owns the library; it is loaded with the first link.
"""

from __future__ import annotations

from cache_messager.links.interface import HOST_FRAME_BYTES, LinkHost
from cache_messager.links.nixl.agent import create_agent, has_rdma, reason_against
from cache_messager.links.nixl.receiver import FrameReader
from cache_messager.links.nixl.sender import FrameWriter
from cache_messager.links.nixl.staging import NUM_SLOTS, Areas
from cache_messager.links.nixl.thread import PollingThread, RunningClock
from cache_messager.work import BlocksWritten, DeviceLost, FrameSent, LinkLost, violation
from kvrelay.errors import TransferError
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.kv_handle import KVDeviceHandle
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import KVFrame
from kvrelay.runtime.logging import log_event

_BUSY_PAUSE_S = 50e-6
_IDLE_PAUSE_S = 0.01
"""Between polls while peers may write: their writes of frames that were refused here must end too."""


class Link:
    """Writes to staging memory of a peer, for peers on other hosts."""

    max_frame_bytes = HOST_FRAME_BYTES
    max_frames = NUM_SLOTS
    create_agent = staticmethod(create_agent)

    def __init__(self, host: LinkHost) -> None:
        self._host = host
        self._thread = PollingThread("nixl link", self._poll, self._thread_failed)
        self._clock = RunningClock()
        self._ends: tuple[FrameWriter, FrameReader] | None = None

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the TCP address of the peer, for the frames without their bytes."""
        return peer.tcp

    def offer(self) -> bytes | None:
        """Return the kind of memory of the pool, whose digests the receiver must be able to compare."""
        reason = reason_against()
        if reason is None and not (self._host.is_only_kind or has_rdma()):
            reason = "no RDMA device, so tcp is faster; transfer.link: nixl uses it all the same"
        if reason is not None:
            log_event("info", "link not possible", {"kind": "nixl", "reason": reason})
            return None
        return self._memory

    @property
    def _memory(self) -> bytes:
        handle = self._host.pool.handle
        return handle.kind.encode() if isinstance(handle, KVDeviceHandle) else b"host"

    # ------------------------------------------------------------ for the sender

    def open(self, peer: PeerId, handle: bytes) -> None:
        """Connect to the peer's agent, in the thread."""

        def connect() -> None:
            try:
                self._writer.open(peer, handle)
            except TransferError as error:
                self._host.post(LinkLost(peer, error.message))

        self._thread.do(connect)

    def leave(self, peer: PeerId) -> None:
        """Release the writes to ``peer`` and disconnect."""

        def leave() -> None:
            if self._ends is not None:
                self._ends[0].leave(peer)

        self._thread.do(leave)

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Gather and write the blocks, and then send the frame."""

        def send() -> None:
            try:
                self._writer.send(peer, frame, source_block_ids)
            except TransferError as error:
                self._host.post(FrameSent(frame, error))

        self._thread.do(send)

    # ------------------------------------------------------------ for the receiver

    def accept(self, link_id: int, offer: bytes) -> bytes:
        """Register staging memory. The first link waits for the library to load. Raises TransferError or OSError."""
        if offer != self._memory:
            raise TransferError(
                f"this node's pool is not in the sender's kind of memory, {offer.decode(errors='replace')}"
            )
        return self._thread.result_of(lambda: self._reader.accept(link_id))

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Wait for the frame's bytes in the thread, then write and verify them."""
        if payload:
            problem = f"{sum(part.nbytes for part in payload)} bytes of payload on a nixl link"
            self._host.post(BlocksWritten(link_id, frame, violation("the sender", problem)))
            return
        self._thread.do(lambda: self._reader.write(link_id, frame, self._clock.now()))

    def drop(self, link_id: int) -> None:
        """End the waiting for frames of this link, and reuse its memory."""
        self._thread.do(lambda: self._reader.drop(link_id))

    def close(self) -> None:
        """End the thread and the library's agent."""
        self._thread.end()
        self._ends = None

    # ------------------------------------------------------------ in the thread

    @property
    def _writer(self) -> FrameWriter:
        return self._create()[0]

    @property
    def _reader(self) -> FrameReader:
        return self._create()[1]

    def _create(self) -> tuple[FrameWriter, FrameReader]:
        """Return both ends, and create them if there are none. Raises TransferError."""
        if self._ends is None:
            agent = self.create_agent()
            areas = Areas(agent, max(HOST_FRAME_BYTES, self._host.pool.geometry.layer_block_bytes))
            self._ends = FrameWriter(self._host, agent, areas), FrameReader(self._host, agent, areas)
        return self._ends

    def _thread_failed(self, error: Exception) -> None:
        """End the messager, because nothing would answer its actions."""
        self._host.post(DeviceLost(f"the thread of the nixl link has failed: {error!r}"))

    def _poll(self) -> float | None:
        """Let both ends advance; return the seconds until they must again."""
        if self._ends is None:
            return None
        writer, reader = self._ends
        writer.advance(self._clock.now())
        reader.advance(self._clock.now())
        if writer.is_busy or reader.is_busy:
            return _BUSY_PAUSE_S
        return _IDLE_PAUSE_S if reader.has_links else None
