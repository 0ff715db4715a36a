"""Cache messager -> its own node."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo, LayerTransfer, LinkAddress, Message
from kvrelay.protocol.quantities import Amount, Speed


class MessagerReady(Message, frozen=True, kw_only=True):
    """Messager -> its node, when its addresses are bound and the pool is mapped, and again once per ``heartbeat_s``.

    The reader registers with the router at the first one, or announces itself in the registry.
    """

    link: LinkAddress


class TransferDone(Message, frozen=True, kw_only=True):
    """P's messager -> P: D has all blocks, verified if ``transfer.checksum`` is on. Nothing reads P's blocks any more.

    The reader releases the messager's hold on the request's blocks.
    """

    request_id: RequestId
    epoch: int
    num_bytes: int
    link: str
    layers: list[LayerTransfer]


class TransferFailed(Message, frozen=True, kw_only=True):
    """P's messager -> P: the transfer has failed, and nothing reads P's blocks for it any more.

    The reader releases the messager's hold on the blocks. If a block was corrupt (``corrupt_kv``), it drops the prompts
    that share the first block from its prefix cache. Unless the request has ended on P, it cancels the reservation and
    sends the router RequestFailed. TransferClosed may follow.
    """

    request_id: RequestId
    epoch: int
    error: ErrorInfo


class TransferClosed(Message, frozen=True, kw_only=True):
    """P's messager -> P, answers CloseTransfer: nothing reads the request's blocks any more.

    The reader releases the messager's hold on the request's blocks.
    """

    request_id: RequestId
    epoch: int


class KVExpected(Message, frozen=True, kw_only=True):
    """D's messager -> D, answers ExpectKV: frames for the blocks are accepted from now on.

    The reader sends P BlocksReserved.
    """

    request_id: RequestId
    epoch: int


class KVArrived(Message, frozen=True, kw_only=True):
    """D's messager -> D: every layer of every block is written and, with ``transfer.checksum``, verified.

    The reader decodes the request if it has the hand-off, else when that arrives.
    """

    request_id: RequestId
    epoch: int
    num_bytes: int


class KVFailed(Message, frozen=True, kw_only=True):
    """D's messager -> D: the transfer has failed, and nothing writes to its blocks any more.

    The reader frees the blocks. Unless the request has ended on D, it sends ReservationEnded to P and RequestFailed to
    the router.
    """

    request_id: RequestId
    epoch: int
    error: ErrorInfo


class KVCancelled(Message, frozen=True, kw_only=True):
    """D's messager -> D, answers CancelKV: nothing writes to the blocks any more.

    The reader frees the blocks when nothing else uses them.
    """

    request_id: RequestId
    epoch: int


class MessagerStats(Message, frozen=True, kw_only=True):
    """Messager -> its node, once per ``heartbeat_s``. ``counters`` never decrease.

    The reader includes all in its ``Load``. ``link_bytes_per_s``: see there.
    """

    counters: dict[str, Amount]
    gauges: dict[str, Amount] = msgspec.field(default_factory=dict)
    link_bytes_per_s: dict[str, Speed] = msgspec.field(default_factory=dict)


class MessagerDumped(Message, frozen=True, kw_only=True):
    """Messager -> its node, answers DumpMessager: the file of ``process``, or the ``error``.

    The reader sends ``router`` Dumped.
    """

    router: PeerId
    dump_id: str
    process: str
    path: str
    error: str


TransferEnding: TypeAlias = TransferDone | TransferFailed | TransferClosed
"""What ends a transfer on P."""

KVEnding: TypeAlias = KVArrived | KVFailed | KVCancelled
"""What ends what D expects."""
