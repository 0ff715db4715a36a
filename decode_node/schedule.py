"""What the scheduler has decided for one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from decode_node.request import DecodeRequest
from kvrelay.node.plans import Chunk


class Loading(NamedTuple):
    """A request that has just got its blocks, and which of them are to be read from the store before it runs."""

    request: DecodeRequest
    first_block: int
    num_blocks: int


@dataclass(slots=True)
class Schedule:
    """One decision: ``chunks[i]`` is of ``requests[i]``.

    ``admitted`` and ``loading`` just got their blocks, ``preempted`` lost theirs; all three have their new status.
    ``exceeds_pool`` decodes alone and has no block to grow into.
    """

    requests: list[DecodeRequest] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[DecodeRequest] = field(default_factory=list)
    loading: list[Loading] = field(default_factory=list)
    preempted: list[DecodeRequest] = field(default_factory=list)
    exceeds_pool: DecodeRequest | None = None

    def add(self, request: DecodeRequest, start: int, budget: int) -> int:
        """Let the step compute the tokens of a prefill from ``start`` on, at most ``budget``; return how many."""
        num_remaining = len(request.token_ids) - start
        num_tokens = min(num_remaining, budget)
        self.requests.append(request)
        self.chunks.append(Chunk(start, num_tokens, num_tokens == num_remaining))
        return num_tokens
