"""A cache messager -> its own node."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.messages.base import ErrorInfo, LayerTransfer, LinkAddress, Message


class MessagerReady(Message, frozen=True, kw_only=True):
    """Messager -> its node, once, when its links are bound and the pool is mapped.

    The reader registers with the router.
    """

    link: LinkAddress


class TransferDone(Message, frozen=True, kw_only=True):
    """P's messager -> P: all blocks are written and verified on D.

    The reader drops the messager's hold on the request's blocks.
    """

    request_id: str
    epoch: int
    num_bytes: int
    link: str
    layers: list[LayerTransfer]


class TransferFailed(Message, frozen=True, kw_only=True):
    """P's messager -> P: the transfer is over without success; nothing reads P's blocks for it any more.

    The reader cancels the reservation and reports RequestFailed.
    """

    request_id: str
    epoch: int
    error: ErrorInfo


class TransferClosed(Message, frozen=True, kw_only=True):
    """P's messager -> P, answers CloseTransfer: nothing reads the request's blocks any more.

    The reader drops the messager's hold on the request's blocks.
    """

    request_id: str
    epoch: int


class KVExpected(Message, frozen=True, kw_only=True):
    """D's messager -> D, answers ExpectKV.

    The reader tells P of the reservation.
    """

    request_id: str
    epoch: int


class KVArrived(Message, frozen=True, kw_only=True):
    """D's messager -> D: every layer of every block is written and verified.

    The reader decodes as soon as it has the hand-off too.
    """

    request_id: str
    epoch: int
    num_bytes: int


class KVFailed(Message, frozen=True, kw_only=True):
    """D's messager -> D: the transfer is over without success; nothing writes to its blocks any more.

    The reader releases the blocks and tells P.
    """

    request_id: str
    epoch: int
    error: ErrorInfo


class KVCancelled(Message, frozen=True, kw_only=True):
    """D's messager -> D, answers CancelKV: nothing writes to the blocks any more.

    The reader releases the blocks.
    """

    request_id: str
    epoch: int


class MessagerStats(Message, frozen=True, kw_only=True):
    """Messager -> its node, once per ``heartbeat_s``: counters that only grow, and gauges, for the node's heartbeat.

    The reader adds them to its load.
    """

    counters: dict[str, float]
    gauges: dict[str, float] = msgspec.field(default_factory=dict)


TransferEnding: TypeAlias = TransferDone | TransferFailed | TransferClosed
"""What ends a transfer on P."""

KVEnding: TypeAlias = KVArrived | KVFailed | KVCancelled
"""What ends what D expects."""
