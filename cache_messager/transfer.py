"""State of one transfer in P's messager: blocks signalled, queued, in flight and written."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cache_messager.block_mask import mask_of, runs_of
from cache_messager.pending import PendingSignal
from kvrelay.errors import LocalProtocolError
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.ids import Attempt, BlockId, PeerId
from kvrelay.protocol.messages.base import LayerTransfer
from kvrelay.protocol.messages.messager_to_messager import FrameAck, KVFrame
from kvrelay.protocol.messages.messager_to_node import TransferEnding, TransferFailed
from kvrelay.protocol.messages.node_to_messager import KVSpan, OpenTransfer


class TransferStatus(StrEnum):
    """Status of a transfer; see the package docstring."""

    PENDING = "pending"
    SENDING = "sending"
    DRAINING = "draining"
    ENDED = "ended"


TRANSITIONS: Table[TransferStatus] = {
    TransferStatus.PENDING: frozenset({TransferStatus.SENDING, TransferStatus.ENDED}),
    TransferStatus.SENDING: frozenset({TransferStatus.DRAINING, TransferStatus.ENDED}),
    TransferStatus.DRAINING: frozenset({TransferStatus.ENDED}),
    TransferStatus.ENDED: frozenset(),
}


@dataclass(slots=True)
class BlockRange:
    """Consecutive blocks to send, the same in ``num_layers`` layers from ``layer`` on.

    ``block_ids[i]`` holds block ``first_block + i``.
    """

    layer: int
    first_block: int
    block_ids: list[BlockId]
    num_layers: int = 1

    @property
    def end_block(self) -> int:
        """The block after the last."""
        return self.first_block + len(self.block_ids)

    @property
    def num_blocks(self) -> int:
        """Blocks of all layers together."""
        return len(self.block_ids) * self.num_layers

    def is_followed_by(self, other: BlockRange) -> bool:
        """Return whether ``other`` is the same blocks in the next layer."""
        is_next = other.layer == self.layer + self.num_layers and other.first_block == self.first_block
        return is_next and other.block_ids == self.block_ids

    def split(self, num_blocks: int) -> BlockRange:
        """Remove and return the first ``num_blocks`` blocks of this range."""
        head = BlockRange(self.layer, self.first_block, self.block_ids[:num_blocks])
        self.first_block += len(head.block_ids)
        self.block_ids = self.block_ids[num_blocks:]
        return head


class FrameKey(NamedTuple):
    """Key of a frame within its transfer."""

    layer: int
    first_block: int

    @classmethod
    def of(cls, message: KVFrame | FrameAck) -> FrameKey:
        """Return the key of a frame, or of the frame that an acknowledgement answers."""
        return cls(message.layer, message.first_block)


class _Layer:
    """Progress of one layer: ``signalled`` is a block mask, times are in seconds since 1970."""

    __slots__ = ("first_sent_s", "last_written_s", "num_bytes", "signalled")

    def __init__(self) -> None:
        self.signalled = 0
        self.first_sent_s = 0.0
        self.last_written_s = 0.0
        self.num_bytes = 0


class Transfer:
    """The outgoing KV of one attempt. Each block of each layer is queued, sent and acknowledged once.

    ``inflight``: frames not acknowledged by D. ``reading``: frames whose blocks the link may still read to make the
    frame. ``busy_since_s``: time of its last progress, or of the first block queued while idle. ``failure`` and
    ``closed``: messages sent to the node when nothing reads its blocks any more.
    """

    __slots__ = (
        "_layers",
        "_num_signalled",
        "_num_written",
        "_tails",
        "attempt",
        "busy_since_s",
        "closed",
        "failure",
        "first_block",
        "inflight",
        "lifecycle",
        "peer",
        "pending",
        "queue",
        "reading",
        "target_block_ids",
    )

    def __init__(self, attempt: Attempt, num_layers: int, now: float) -> None:
        self.attempt = attempt
        self.lifecycle = Lifecycle(f"transfer {attempt}", TRANSITIONS, TransferStatus.PENDING, now)
        self.pending: list[PendingSignal] = []
        self.peer = PeerId("")
        self.first_block = 0
        self.target_block_ids: list[BlockId] = []
        self.queue: deque[BlockRange] = deque()
        self.inflight: dict[FrameKey, KVFrame] = {}
        self.reading: set[FrameKey] = set()
        self.busy_since_s = now
        self.failure: TransferFailed | None = None
        self.closed: TransferEnding | None = None
        self._layers = [_Layer() for _ in range(num_layers)]
        self._tails: dict[int, BlockRange] = {}
        self._num_signalled = 0
        self._num_written = 0

    @property
    def status(self) -> TransferStatus:
        """Its current status."""
        return self.lifecycle.status

    @property
    def final_messages(self) -> list[TransferEnding]:
        """The messages sent to the node at the end, in order."""
        return [message for message in (self.failure, self.closed) if message is not None]

    @property
    def num_bytes(self) -> int:
        """Bytes written at D."""
        return sum(layer.num_bytes for layer in self._layers)

    @property
    def is_signalled(self) -> bool:
        """Whether all blocks of all layers are computed."""
        return self._num_signalled == len(self._layers) * len(self.target_block_ids)

    @property
    def is_written(self) -> bool:
        """Whether all blocks of all layers are written at D."""
        return self._num_written == len(self._layers) * len(self.target_block_ids)

    def open(self, message: OpenTransfer, now: float) -> list[PendingSignal]:
        """Set the target blocks at D; return the pending signals, in order."""
        self.lifecycle.move(TransferStatus.SENDING, now)
        self.peer = message.link.peer
        self.first_block = message.first_block
        self.target_block_ids = message.target_block_ids
        pending, self.pending = self.pending, []
        return pending

    def signal(self, layer: int, span: KVSpan, now: float) -> None:
        """Queue the blocks of ``span`` in ``layer`` that D reserved and that were not queued before.

        Raises LocalProtocolError if the span goes beyond the blocks D has reserved.
        """
        first = max(span.first_block, self.first_block)
        end = span.first_block + len(span.source_block_ids)
        if end > self.first_block + len(self.target_block_ids):
            raise LocalProtocolError(f"block {end - 1} was signalled, but D has reserved none for it")
        if first >= end:
            return
        if not self.queue and not self.inflight:
            self.busy_since_s = now
        progress = self._layers[layer]
        fresh = mask_of(first, end - first) & ~progress.signalled
        progress.signalled |= fresh
        for run_first, count in runs_of(fresh):
            offset = run_first - span.first_block
            self._queue(layer, run_first, span.source_block_ids[offset : offset + count])
            self._num_signalled += count

    def _queue(self, layer: int, first_block: int, block_ids: list[BlockId]) -> None:
        """Queue a range, or extend the last queued range of this layer."""
        tail = self._tails.get(layer)
        if tail is not None and tail.end_block == first_block:
            tail.block_ids.extend(block_ids)
        else:
            self._tails[layer] = BlockRange(layer, first_block, block_ids)
            self.queue.append(self._tails[layer])

    def next_frame(self, max_blocks: int) -> BlockRange:
        """Dequeue at most ``max_blocks`` blocks: consecutive, of one layer or the same in several layers."""
        head = self.queue[0]
        if len(head.block_ids) > max_blocks:
            return head.split(max_blocks)
        self._take_head()
        while self.queue and head.num_blocks + len(head.block_ids) <= max_blocks and head.is_followed_by(self.queue[0]):
            self._take_head()
            head.num_layers += 1
        return head

    def _take_head(self) -> None:
        head = self.queue.popleft()
        if self._tails.get(head.layer) is head:
            del self._tails[head.layer]

    def send(self, blocks: BlockRange, num_bytes: int, *, slot: int, now: float) -> KVFrame:
        """Return the frame for ``blocks`` and record it as in flight. The link sets its digest and source blocks."""
        first, end = blocks.first_block - self.first_block, blocks.end_block - self.first_block
        frame = KVFrame(
            request_id=self.attempt.request_id,
            epoch=self.attempt.epoch,
            layer=blocks.layer,
            first_block=blocks.first_block,
            target_block_ids=self.target_block_ids[first:end],
            source_block_ids=[],
            num_bytes=num_bytes,
            digest=0,
            num_layers=blocks.num_layers,
            slot=slot,
        )
        key = FrameKey.of(frame)
        self.inflight[key] = frame
        self.reading.add(key)
        for layer in self._layers[frame.layer : frame.layer + frame.num_layers]:
            layer.first_sent_s = layer.first_sent_s or now
        return frame

    def written(self, frame: KVFrame, now: float) -> None:
        """Record that D has written ``frame``."""
        for layer in self._layers[frame.layer : frame.layer + frame.num_layers]:
            layer.last_written_s = now
            layer.num_bytes += frame.num_bytes // frame.num_layers
        self._num_written += frame.num_layers * len(frame.target_block_ids)
        self.busy_since_s = now

    def drop_queue(self) -> None:
        """Drop all queued blocks."""
        self.queue.clear()
        self._tails.clear()

    def timeline(self) -> list[LayerTransfer]:
        """Return the layer transfers, in the order of layers."""
        return [
            LayerTransfer(index, layer.first_sent_s, layer.last_written_s, layer.num_bytes)
            for index, layer in enumerate(self._layers)
            if layer.num_bytes
        ]
