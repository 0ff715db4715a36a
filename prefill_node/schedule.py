"""What a prefill node computes next.

P has one job, so its scheduler has no reserve for decoding: prompts that run get the whole token budget of the step
(FastDeploy #7944), in the order of ``scheduler.prefill_order``.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvrelay.core.step import ScheduledSequence
from prefill_node.request import PrefillRequest


def prefill_schedule(
    running: Iterable[PrefillRequest], token_budget: int, block_size: int
) -> list[tuple[PrefillRequest, ScheduledSequence]]:
    """Return the next chunk of each request that gets one, in the order of ``running``.

    A prompt that does not fit the rest of the budget is cut at a block's end, so that a chunk's blocks can travel as
    soon as they are computed, unless the budget is smaller than that one block. ``running`` are requests without their
    first token yet; what is only still sending is not among them and costs nothing.
    """
    batch: list[tuple[PrefillRequest, ScheduledSequence]] = []
    for request in running:
        sequence, start, remaining = request.sequence, request.next_position, request.num_remaining_tokens
        num_tokens = min(remaining, token_budget)
        if num_tokens < remaining:
            aligned = (start + num_tokens) // block_size * block_size - start
            if aligned > 0:
                num_tokens = aligned
            elif batch:
                break
        samples = num_tokens == remaining
        batch.append((request, ScheduledSequence(sequence, start, num_tokens, samples)))
        token_budget -= num_tokens
        if token_budget == 0 or not samples:
            break
    return batch
