"""P's cache messager <-> D's cache messager. All travel on the link that P's messager opened."""

from __future__ import annotations

from kvrelay.core.geometry import KVGeometry
from kvrelay.core.kv_handle import KVMemoryHandle
from kvrelay.core.messages.base import Message


class LinkHello(Message, frozen=True, kw_only=True):
    """P's messager -> D's, first on each link. ``pool``: the sender would have its memory read rather than send it.

    The reader answers LinkAccepted or LinkRefused.
    """

    geometry: KVGeometry
    pool: KVMemoryHandle | None


class LinkAccepted(Message, frozen=True, kw_only=True):
    """D's messager -> P's. ``shm``: the reader's pool could be mapped, frames carry no payload.

    The reader sends frames, with at most ``credit_bytes`` of KV not yet acknowledged.
    """

    shm: bool
    credit_bytes: int


class LinkRefused(Message, frozen=True, kw_only=True):
    """D's messager -> P's: the two cannot exchange KV, or not any more. ``code``: that of a TransferError.

    The reader fails every transfer over this link.
    """

    reason: str
    code: str = "transfer_failed"


class KVFrame(Message, frozen=True, kw_only=True):
    """P's messager -> D's: some blocks, the same in ``num_layers`` layers from ``layer`` on.

    Payload follows, layer by layer all K and then all V, unless the link is shm. The reader verifies the digest
    (xxh3-64 over the payload, 0 if unchecked), writes each block once and answers FrameAck. ``source_block_ids`` tell
    where the blocks lie in the sender's pool, for shm.
    """

    request_id: str
    epoch: int
    layer: int
    first_block: int
    target_block_ids: list[int]
    source_block_ids: list[int]
    num_bytes: int
    digest: int
    num_layers: int = 1

    @property
    def layers(self) -> range:
        """The layers whose blocks these are."""
        return range(self.layer, self.layer + self.num_layers)


class FrameAck(Message, frozen=True, kw_only=True):
    """D's messager -> P's, answers KVFrame. ``status``: ``written``, ``stale`` (not expected now) or ``corrupt``.

    The reader takes the credit back; anything but ``written`` fails the transfer.
    """

    request_id: str
    epoch: int
    layer: int
    first_block: int
    num_bytes: int
    status: str
