"""A node -> its own cache messager."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.messages.base import LinkAddress, Message


class KVSpan(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one request that are complete in the signalled layer, by place in the request and in P's pool.

    ``source_block_ids[i]`` holds the request's block ``first_block + i``.
    """

    request_id: str
    epoch: int
    first_block: int
    source_block_ids: list[int]


class LayerSignal(Message, frozen=True, kw_only=True):
    """P -> its messager, after each layer of each step, or after several: ``num_layers`` from ``layer`` on.

    The reader sends those blocks of those layers, or keeps the signal until the transfer is opened.
    """

    step: int
    layer: int
    spans: list[KVSpan]
    num_layers: int = 1


class CachedSignal(Message, frozen=True, kw_only=True):
    """P -> its messager, when a prompt begins with blocks from P's prefix cache: complete in every layer.

    The reader does as for a LayerSignal, layer by layer.
    """

    span: KVSpan


class OpenTransfer(Message, frozen=True, kw_only=True):
    """P -> its messager, when D has reserved blocks.

    The reader opens a link if it has none, sends what was signalled so far, in order, and what is signalled later.
    ``target_block_ids[i]`` takes the request's block ``first_block + i``; blocks before ``first_block`` are not sent.
    Answered by TransferDone or TransferFailed.
    """

    request_id: str
    epoch: int
    link: LinkAddress
    first_block: int
    target_block_ids: list[int]


class CloseTransfer(Message, frozen=True, kw_only=True):
    """P -> its messager: forget this request's signals and transfer.

    The reader answers TransferClosed once nothing reads P's blocks any more.
    """

    request_id: str
    epoch: int


class ExpectKV(Message, frozen=True, kw_only=True):
    """D -> its messager, before it tells P about a reservation.

    The reader takes frames for these blocks from now on and answers KVExpected; KVArrived or KVFailed follows.
    """

    request_id: str
    epoch: int
    first_block: int
    target_block_ids: list[int]


class CancelKV(Message, frozen=True, kw_only=True):
    """D -> its messager: let nothing more into these blocks.

    The reader answers KVCancelled; no byte is written to the blocks after that.
    """

    request_id: str
    epoch: int


class StopMessager(Message, frozen=True, kw_only=True):
    """Node -> its messager: the node is leaving.

    The reader closes its links and exits.
    """


NodeToMessager: TypeAlias = (
    LayerSignal | CachedSignal | OpenTransfer | CloseTransfer | ExpectKV | CancelKV | StopMessager
)
