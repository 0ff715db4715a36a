"""One expectation of D's messager: which blocks may be written, and which have been."""

from __future__ import annotations

from enum import StrEnum

from cache_messager.block_mask import mask_of
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import Attempt
from kvrelay.protocol.messages.messager_to_messager import KVFrame
from kvrelay.protocol.messages.messager_to_node import KVEnding
from kvrelay.protocol.messages.node_to_messager import ExpectKV


class ExpectationStatus(StrEnum):
    """Status of an expectation; see the package docstring."""

    RECEIVING = "receiving"
    DRAINING = "draining"
    ENDED = "ended"


TRANSITIONS: Table[ExpectationStatus] = {
    ExpectationStatus.RECEIVING: frozenset({ExpectationStatus.DRAINING, ExpectationStatus.ENDED}),
    ExpectationStatus.DRAINING: frozenset({ExpectationStatus.ENDED}),
    ExpectationStatus.ENDED: frozenset(),
}


class Expectation:
    """The incoming KV of one attempt. A frame claims its blocks and is written once.

    ``link_id``: the link of its latest frame. ``num_writing``: writes in progress. ``final_message``: sent to the node
    when no write to the blocks is in progress any more.
    """

    __slots__ = (
        "_claimed",
        "_num_layers",
        "_num_written",
        "_written",
        "attempt",
        "final_message",
        "lifecycle",
        "link_id",
        "message",
        "num_bytes",
        "num_writing",
    )

    def __init__(self, message: ExpectKV, num_layers: int, now: float) -> None:
        self.message = message
        self.attempt = Attempt(message.request_id, message.epoch)
        self.lifecycle = Lifecycle(f"expectation {self.attempt}", TRANSITIONS, ExpectationStatus.RECEIVING, now)
        self.link_id: int | None = None
        self.num_writing = 0
        self.num_bytes = 0
        self.final_message: KVEnding | None = None
        self._num_layers = num_layers
        self._num_written = 0
        self._claimed = [0] * num_layers
        self._written = [0] * num_layers

    @property
    def status(self) -> ExpectationStatus:
        """Its current status."""
        return self.lifecycle.status

    @property
    def is_written(self) -> bool:
        """Whether all blocks of all layers are in the pool."""
        return self._num_written == self._num_layers * len(self.message.target_block_ids)

    def problem_with(self, frame: KVFrame, geometry: KVGeometry) -> str | None:
        """Return how ``frame`` violates the expectation, or None."""
        offset, count = frame.first_block - self.message.first_block, len(frame.target_block_ids)
        if not 0 <= frame.layer < frame.layer + frame.num_layers <= self._num_layers:
            return f"{frame.num_layers} layers from layer {frame.layer} of {self._num_layers} on"
        if offset < 0 or count == 0 or self.message.target_block_ids[offset : offset + count] != frame.target_block_ids:
            return f"{count} blocks from block {frame.first_block} on are not those reserved"
        if frame.num_bytes != count * frame.num_layers * geometry.layer_block_bytes:
            return f"{frame.num_bytes} bytes for {frame.num_layers} x {count} blocks of {geometry.layer_block_bytes}"
        mask = _mask(frame)
        claimed = {self._claimed[layer] & mask for layer in frame.layers}
        if claimed not in ({0}, {mask}):
            return f"some of {count} blocks from block {frame.first_block} on came before in another frame"
        return None

    def is_claimed(self, frame: KVFrame) -> bool:
        """Return whether the frame's blocks are written or being written."""
        return self._claimed[frame.layer] & _mask(frame) != 0

    def has_written(self, frame: KVFrame) -> bool:
        """Return whether the frame's blocks are written."""
        mask = _mask(frame)
        return all(self._written[layer] & mask == mask for layer in frame.layers)

    def claim(self, frame: KVFrame) -> None:
        """Mark the frame's blocks as being written."""
        mask = _mask(frame)
        for layer in frame.layers:
            self._claimed[layer] |= mask
        self.num_writing += 1

    def wrote(self, frame: KVFrame) -> None:
        """Mark the frame's blocks as written to the pool."""
        mask = _mask(frame)
        for layer in frame.layers:
            self._written[layer] |= mask
        self._num_written += frame.num_layers * len(frame.target_block_ids)
        self.num_bytes += frame.num_bytes


def _mask(frame: KVFrame) -> int:
    return mask_of(frame.first_block, len(frame.target_block_ids))
