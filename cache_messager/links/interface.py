"""What a link is, and what it may use of its messager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvrelay.kv_pool.interface import KVPool
from kvrelay.protocol.ids import BlockId, PeerId
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import KVFrame

UNCHECKED = 0
"""Digest of a frame that is not verified."""


class LinkHost(Protocol):
    """The messager as a link sees it. Methods may be called from any thread.

    ``pool`` is the node's KV pool, ``checksum`` whether payload is verified (``transfer.checksum``).
    """

    pool: KVPool
    checksum: bool

    def send(self, peer: PeerId, frame: KVFrame, payload: Sequence[memoryview] = ()) -> None:
        """Send ``frame``, complete with its digest, and post the FrameSent that answers ``KVLink.send``."""

    def post(self, event: object) -> None:
        """Let the messager's machine handle ``event``: a FrameSent with an error, or a BlocksWritten."""


class KVLink(Protocol):
    """All links of one kind in one messager, at both ends. Methods are called on the messager's loop.

    A DeviceError that they raise, or a DeviceLost that they post from a thread, ends the messager: it answers what is
    under way.

    A sender names its links by the peer, a receiver by a ``link_id``.
    """

    def __init__(self, host: LinkHost) -> None: ...

    @staticmethod
    def address(here: str, peer: LinkAddress) -> str | None:
        """Return the ZMQ address to reach ``peer`` at from the host ``here``; None: this kind cannot reach it."""

    def offer(self) -> bytes | None:
        """Return what a receiver needs to accept such a link, opaque to all others; None: not possible here."""

    def send(self, peer: PeerId, frame: KVFrame, source_block_ids: list[BlockId]) -> None:
        """Get these blocks of the pool on their way, with their digest in ``frame``.

        Answered by one FrameSent, by way of ``LinkHost.send`` or, with an error, of ``LinkHost.post``. Until then, and
        until the peer has acknowledged the frame or the link is lost, the blocks may be read.
        """

    def accept(self, link_id: int, offer: bytes) -> None:
        """Prepare to receive by ``link_id``.

        Raises KVRelayError, MsgspecError, OSError or ValueError if that is not possible.
        """

    def write(self, link_id: int, frame: KVFrame, payload: tuple[memoryview, ...]) -> None:
        """Put the blocks into the pool, once, and verify that they are those that the sender read.

        Answered by one BlocksWritten. Its error is a CorruptKVError if the bytes are wrong, another TransferError if
        the frame is not one of this kind; the blocks hold nothing of use then.
        """

    def drop(self, link_id: int) -> None:
        """Give back what ``accept`` took, after the writes under way. Called once per accepted link."""

    def close(self) -> None:
        """Give everything back; nothing is under way."""
