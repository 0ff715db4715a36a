"""The sending end of a link: which kind, how far it is, and how much may be under way."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from cache_messager.transfer import Transfer
from kvrelay.core.errors import TransferError
from kvrelay.core.ids import PeerId
from kvrelay.core.messages.base import LinkAddress

MAX_FRAME_BYTES = 4 << 20
"""Payload of the largest frame: long enough to run at full speed, short enough that two transfers share a link well."""

MAX_INFLIGHT_FRAMES = 256
"""Frames without acknowledgement per link, however small: well below what a socket queues for a peer."""


class Route(NamedTuple):
    """How to reach a messager: ``kind`` is ``shm``, ``ipc`` or ``tcp``; shm becomes ipc if nothing can be mapped."""

    kind: str
    address: str


def choose_route(setting: str, here: str, link: LinkAddress) -> Route:
    """Return the route to ``link`` for the config's ``transfer.link`` on the host ``here``.

    Raises TransferError if the setting asks for a link within one host and ``link`` is on another.
    """
    same_host = link.host_id == here
    if setting in ("shm", "ipc") and not same_host:
        raise TransferError(f"transfer.link is {setting}, but {link.peer} is on another host")
    if setting == "tcp" or not same_host:
        return Route("tcp", link.tcp)
    return Route("shm" if setting in ("auto", "shm") else "ipc", link.ipc)


class SenderLink:
    """One connection to D's messager, shared by all transfers to that D.

    ``ready`` holds the transfers that have something to send, in the order of their turns. Until D's messager has
    accepted the link its credit is zero.
    """

    __slots__ = ("accepted", "credit_bytes", "inflight_bytes", "inflight_frames", "kind", "peer", "ready", "transfers")

    def __init__(self, peer: PeerId, route: Route) -> None:
        self.peer = peer
        self.kind = route.kind
        self.accepted = False
        self.credit_bytes = 0
        self.inflight_bytes = 0
        self.inflight_frames = 0
        self.ready: deque[Transfer] = deque()
        self.transfers: dict[Transfer, None] = {}

    def accept(self, shm: bool, credit_bytes: int) -> None:
        """Take the peer's answer."""
        self.accepted = True
        self.credit_bytes = credit_bytes
        if self.kind == "shm" and not shm:
            self.kind = "ipc"

    def blocks_per_frame(self, layer_block_bytes: int) -> int:
        """Return how many blocks a frame may hold: several frames fit into the credit, so that the link never idles."""
        return max(1, min(MAX_FRAME_BYTES, self.credit_bytes // 4) // layer_block_bytes)

    @property
    def room_bytes(self) -> int:
        """Bytes that may be sent now."""
        return self.credit_bytes - self.inflight_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Tell whether a frame of ``num_bytes`` may be sent now."""
        return self.accepted and num_bytes <= self.room_bytes and self.inflight_frames < MAX_INFLIGHT_FRAMES

    def enqueue(self, transfer: Transfer) -> None:
        """Give ``transfer`` a turn if it has something to send and waits for none yet."""
        if transfer.queue and transfer not in self.ready:
            self.ready.append(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Send nothing more of ``transfer``."""
        transfer.drop_queue()
        if transfer in self.ready:
            self.ready.remove(transfer)

    def took(self, num_bytes: int) -> None:
        """Note a frame under way."""
        self.inflight_bytes += num_bytes
        self.inflight_frames += 1

    def returned(self, num_bytes: int) -> None:
        """Note that a frame was acknowledged."""
        self.inflight_bytes -= num_bytes
        self.inflight_frames -= 1
