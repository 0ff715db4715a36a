"""Node -> its own cache messager."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.ids import BlockId, PeerId, RequestId
from kvrelay.protocol.messages.base import LinkAddress, Message


class KVSpan(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one request that are complete in the signalled layers.

    ``source_block_ids[i]`` in P's pool holds the request's block ``first_block + i``.
    """

    request_id: RequestId
    epoch: int
    first_block: int
    source_block_ids: list[BlockId]


class LayerSignal(Message, frozen=True, kw_only=True):
    """P -> its messager, after one or more layers of a step: ``num_layers`` from ``layer`` on.

    The reader sends those blocks of those layers, or keeps the signal until the transfer is opened. With
    ``transfer.layerwise`` off it sends nothing of a request before all its blocks are signalled in all layers. A
    transfer with too many signals before OpenTransfer fails.
    """

    step: int
    layer: int
    spans: list[KVSpan]
    num_layers: int = 1


class CachedSignal(Message, frozen=True, kw_only=True):
    """P -> its messager, before a prompt's first step, for blocks from P's prefix cache or from the store.

    The reader treats it as a LayerSignal for every layer.
    """

    span: KVSpan


class OpenTransfer(Message, frozen=True, kw_only=True):
    """P -> its messager, when D has reserved blocks.

    The reader opens a link to D's messager if it has none, and sends the blocks signalled so far and later, in order.
    ``target_block_ids[i]`` is for the request's block ``first_block + i``; blocks before ``first_block`` are not sent.
    Answered by TransferDone or TransferFailed, unless CloseTransfer comes first.
    """

    request_id: RequestId
    epoch: int
    link: LinkAddress
    first_block: int
    target_block_ids: list[BlockId]


class CloseTransfer(Message, frozen=True, kw_only=True):
    """P -> its messager, when the request ends on P before its transfer is done, and once per ``heartbeat_s`` until the
    answer.

    The reader drops the request's signals and transfer, and answers TransferClosed when nothing reads P's blocks any
    more.
    """

    request_id: RequestId
    epoch: int


class ExpectKV(Message, frozen=True, kw_only=True):
    """D -> its messager, before D answers a ReserveBlocks with BlocksReserved.

    The reader accepts frames for these blocks from now on, from ``sender`` (P's messager) only unless it is None, and
    answers KVExpected. KVArrived or KVFailed follows, unless CancelKV comes first.
    """

    request_id: RequestId
    epoch: int
    first_block: int
    target_block_ids: list[BlockId]
    sender: PeerId | None = None


class CancelKV(Message, frozen=True, kw_only=True):
    """D -> its messager, when the request ends on D before its KV has arrived, and once per ``heartbeat_s`` until the
    answer.

    The reader accepts no further frames for the blocks and answers KVCancelled when nothing writes to them any more.
    """

    request_id: RequestId
    epoch: int


class DumpMessager(Message, frozen=True, kw_only=True):
    """Node -> its messager, when ``router`` asks for a Dump.

    The reader writes its recording to a file, and answers MessagerDumped.
    """

    router: PeerId
    dump_id: str
    with_prompts: bool


class StopMessager(Message, frozen=True, kw_only=True):
    """Node -> its messager, when the node exits.

    The reader closes its links and exits.
    """


NodeToMessager: TypeAlias = (
    LayerSignal | CachedSignal | OpenTransfer | CloseTransfer | ExpectKV | CancelKV | DumpMessager | StopMessager
)
