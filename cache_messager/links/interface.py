"""The protocol of a link, and of the messager that hosts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import KVFrame

UNCHECKED = 0
"""Digest of a frame that is not verified."""

HOST_FRAME_BYTES = 4 << 20
"""Maximum KV of a frame that the host copies: enough for full throughput, and transfers still share a link fairly."""


class LinkHost(Protocol):
    """The interface of the messager for links. Methods may be called from any thread.

    ``pool``: the node's KV pool. ``checksum``: whether payload is verified (``transfer.checksum``).
    ``peer_timeout_s``: seconds of silence after which a peer counts as lost. ``is_only_kind``: the config asks for one
    kind of link, so a kind that is possible but not the best is used all the same.
    """

    pool: KVPool
    checksum: bool
    peer_timeout_s: float
    is_only_kind: bool

    def send(self, peer: PeerId, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        """Send ``frame``, complete with its digest, and post the FrameSent that answers ``KVLink.send``."""

    def post(self, event: object) -> None:
        """Post ``event`` to the messager's machine: a FrameSent with an error, a BlocksWritten or a LinkLost."""


class KVLink(Protocol):
    """All links of one kind in one messager, at both ends. Methods are called on the messager's loop.

    A DeviceError that they raise, or a DeviceLost that they post from a thread, ends the messager; actions in progress
    then need no other answer. A sender identifies its links by the peer, a receiver by a ``link_id``.

    ``max_frame_bytes``: maximum KV of a frame, which may be of several layers. ``max_frames``: maximum frames of one
    link that the receiver has not acknowledged.
    """

    max_frame_bytes: int
    max_frames: int

    def __init__(self, host: LinkHost) -> None: ...

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the ZMQ address of ``peer`` for the host ``here``, or None if this kind cannot reach it."""

    def offer(self) -> bytes | None:
        """Return the data a receiver needs to accept such a link, opaque to all others.

        None if such a link is not possible here; why is logged.
        """

    def open(self, peer: PeerId, handle: bytes) -> None:
        """Prepare to send to ``peer``, whose ``accept`` returned ``handle``. A failure is posted as LinkLost."""

    def leave(self, peer: PeerId) -> None:
        """Stop sending to ``peer`` and release the resources of ``open``. ``send`` is still answered."""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Send these blocks of the pool, with their digest in ``frame``.

        Answered by one FrameSent through ``LinkHost.send`` or, with an error, ``LinkHost.post``. The blocks may be read
        until then, and until the peer has acknowledged the frame or the link is lost.
        """

    def accept(self, link_id: int, offer: bytes) -> bytes:
        """Prepare to receive over ``link_id``; return the data that the sender's ``open`` needs.

        Raises KVRelayError, MsgspecError, OSError, ValueError or RecursionError if that is not possible.
        """

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Write the blocks to the pool once, and verify that they equal those the sender read.

        Answered by one BlocksWritten. Its error is a CorruptKVError if the bytes differ, another TransferError if the
        frame is invalid for this kind; the content of the blocks is then invalid.
        """

    def drop(self, link_id: int) -> None:
        """Release the resources of ``accept`` after the writes in progress. Called once per accepted link."""

    def close(self) -> None:
        """Release all resources. Called when nothing is in progress."""
