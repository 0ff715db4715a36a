"""Signals that arrive before their transfer is opened. Layer 0 is usually computed before D has reserved blocks."""

from __future__ import annotations

from typing import NamedTuple

from kvrelay.protocol.messages.node_to_messager import KVSpan

MAX_PENDING_BLOCKS = 1 << 21
"""Block ids kept in such signals, over all requests (some 80 MB)."""


class PendingSignal(NamedTuple):
    """A span that is complete in ``layers``."""

    layers: range
    span: KVSpan


class PendingCount:
    """How much is kept over all transfers, so that it stays bounded."""

    def __init__(self) -> None:
        self.num_signals = 0
        self.num_blocks = 0

    def has_room(self, signal: PendingSignal) -> bool:
        """Tell whether ``signal`` may be kept too."""
        return self.num_blocks + len(signal.span.source_block_ids) <= MAX_PENDING_BLOCKS

    def add(self, signal: PendingSignal) -> None:
        """Note that ``signal`` is kept."""
        self.num_signals += 1
        self.num_blocks += len(signal.span.source_block_ids)

    def remove(self, signals: list[PendingSignal]) -> None:
        """Note that ``signals`` are kept no longer."""
        self.num_signals -= len(signals)
        self.num_blocks -= sum(len(signal.span.source_block_ids) for signal in signals)
