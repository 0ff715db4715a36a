"""What a prefill node computes next.

P has one job, so its scheduler has no reserve for decoding: prompts that run get the whole token budget of the step
(FastDeploy #7944), in the order of ``scheduler.prefill_order``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvrelay.node.plans import Chunk
from prefill_node.request import PrefillRequest

NOTHING: Mapping[PrefillRequest, Chunk] = {}


def prefill_schedule(
    running: Iterable[PrefillRequest],
    token_budget: int,
    block_size: int,
    in_flight: Mapping[PrefillRequest, Chunk] = NOTHING,
) -> list[tuple[PrefillRequest, Chunk]]:
    """Return the next chunk of each request that gets one, in the order of ``running``.

    A prompt that does not fit the rest of the budget is cut at a block's end, so that a chunk's blocks can travel as
    soon as they are computed, unless the budget is smaller than that one block. ``running`` are requests with blocks
    and without their first token; those that are only sending are not among them. The next chunk of a request that
    has one ``in_flight`` begins where that ends.
    """
    batch: list[tuple[PrefillRequest, Chunk]] = []
    for request in running:
        start = in_flight[request].end if request in in_flight else request.next_position
        remaining = len(request.token_ids) - start
        if remaining == 0:  # its last chunk is in flight
            continue
        num_tokens = min(remaining, token_budget)
        if num_tokens < remaining:
            aligned = (start + num_tokens) // block_size * block_size - start
            if aligned > 0:
                num_tokens = aligned
            elif batch:
                break
        samples = num_tokens == remaining
        batch.append((request, Chunk(start, num_tokens, samples)))
        token_budget -= num_tokens
        if token_budget == 0 or not samples:
            break
    return batch
