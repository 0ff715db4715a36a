"""How long prompts waited before their first token was computed, by length."""

from __future__ import annotations

from bisect import bisect_left

from kvrelay.protocol.messages.base import WAIT_BOUNDS_S, PromptWait
from kvrelay.protocol.prompt_lengths import NUM_LENGTH_CLASSES, length_class


class PromptWaits:
    """A histogram for each class of lengths; it only grows."""

    def __init__(self) -> None:
        self._counts = [[0] * (len(WAIT_BOUNDS_S) + 1) for _ in range(NUM_LENGTH_CLASSES)]
        self._total_s = [0.0] * NUM_LENGTH_CLASSES

    def observe(self, num_tokens: int, wait_s: float) -> None:
        """Count a prompt with ``num_tokens`` to compute that waited for ``wait_s`` seconds."""
        index = length_class(num_tokens)
        self._counts[index][bisect_left(WAIT_BOUNDS_S, wait_s)] += 1
        self._total_s[index] += wait_s

    def report(self) -> list[PromptWait]:
        """Return the histograms as they are now, for heartbeats."""
        return [PromptWait(list(counts), total_s) for counts, total_s in zip(self._counts, self._total_s, strict=True)]
