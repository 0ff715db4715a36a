"""Signals that arrive before their transfer is opened. Layer 0 is usually computed before D has reserved blocks."""

from __future__ import annotations

from typing import NamedTuple

from kvrelay.protocol.messages.node_to_messager import KVSpan

MAX_PENDING_BLOCKS = 1 << 21
"""Maximum block ids in pending signals over all requests (about 80 MB)."""


class PendingSignal(NamedTuple):
    """A span whose KV is computed in ``layers``."""

    layers: range
    span: KVSpan


class PendingCount:
    """Counts the pending signals of all transfers, to bound their memory."""

    def __init__(self) -> None:
        self.num_signals = 0
        self.num_blocks = 0

    def has_room(self, signal: PendingSignal) -> bool:
        """Return whether there is room for ``signal``."""
        return self.num_blocks + len(signal.span.source_block_ids) <= MAX_PENDING_BLOCKS

    def add(self, signal: PendingSignal) -> None:
        """Count ``signal``."""
        self.num_signals += 1
        self.num_blocks += len(signal.span.source_block_ids)

    def remove(self, signals: list[PendingSignal]) -> None:
        """Remove ``signals`` from the count."""
        self.num_signals -= len(signals)
        self.num_blocks -= sum(len(signal.span.source_block_ids) for signal in signals)
