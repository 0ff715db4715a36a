"""What a step computes of requests that decode: the newest token of each, and drafts for what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from decode_node.request import DecodeRequest
from decode_node.speculate import NoProposer, proposer
from kvrelay.config.cluster_config import SchedulerConfig, SpeculativeConfig
from kvrelay.node.plans import Chunk
from kvstore.blocks.kv_cache import KVCache


class Decodes:
    """Takes turns if there are more decodes than the token budget allows, and gives them blocks to grow into."""

    def __init__(self, config: SchedulerConfig, speculative: SpeculativeConfig, kv: KVCache, block_size: int) -> None:
        self._kv = kv
        self._proposer = proposer(speculative)
        self._is_plain = isinstance(self._proposer, NoProposer)
        self._token_budget = config.max_num_batched_tokens
        self._watermark_blocks = int(config.watermark * kv.num_blocks)
        self._block_size = block_size
        self._next = 0

    def after(
        self,
        in_flight: Mapping[DecodeRequest, Chunk],
        decoding: Iterable[DecodeRequest],
        prefilling: Iterable[DecodeRequest],
    ) -> list[DecodeRequest]:
        """Return the requests that decode after the plans in flight, as far as their next position is known by then.

        Not those whose token in flight is their last. A prompt whose last chunk is in flight decodes next.

        With drafts the next position depends on how many are accepted, and drafting needs known tokens. Then no request
        decodes until the decodes in flight are over, so that all go on together and not in two groups.
        """
        if not self._is_plain and any(chunk.samples for chunk in in_flight.values()):
            return []
        after = [request for request in decoding if request not in in_flight or _goes_on(request, in_flight[request])]
        after += [request for request in prefilling if request in in_flight and _goes_on(request, in_flight[request])]
        return after

    def within_budget(self, decodes: list[DecodeRequest]) -> list[DecodeRequest]:
        """Return all of ``decodes`` or, if they are more than the token budget, the next of them, in rotation."""
        if len(decodes) <= self._token_budget:
            return decodes
        first = self._next % len(decodes)
        self._next += self._token_budget
        return (decodes[first:] + decodes[:first])[: self._token_budget]

    def grow(self, chunks: Sequence[tuple[DecodeRequest, int]]) -> bool:
        """Give each request the block that its tokens up to the end of its chunk need, if there are enough for all.

        ``chunks``: (request, end of the chunk). Returns False, having changed nothing, if there are too few blocks.
        """
        size = self._block_size
        need_block = [request for request, end in chunks if end > len(request.block_table) * size]
        if not self._kv.can_allocate(len(need_block)):
            return False
        for request, block in zip(need_block, self._kv.allocate(len(need_block)), strict=True):
            request.block_table.append(block)
        return True

    def chunks(
        self, decodes: Sequence[DecodeRequest], in_flight: Mapping[DecodeRequest, Chunk]
    ) -> tuple[list[Chunk], int]:
        """Return what is computed of each of ``decodes``, whose newest tokens have their blocks; and how many tokens.

        One that is ``in_flight`` awaits the token that is sampled there.
        """
        if not self._is_plain:
            return self._with_drafts(decodes)
        if not in_flight:
            return [Chunk(request.num_computed_tokens, 1, True) for request in decodes], len(decodes)
        chunks = [
            Chunk(in_flight[request].end, 1, True, awaits=True)
            if request in in_flight
            else Chunk(request.num_computed_tokens, 1, True)
            for request in decodes
        ]
        return chunks, len(chunks)

    def _with_drafts(self, decodes: Sequence[DecodeRequest]) -> tuple[list[Chunk], int]:
        num_tokens = len(decodes)
        chunks: list[Chunk] = []
        for request in decodes:
            drafts = self._drafts(request, self._token_budget - num_tokens)
            size = 1 + len(drafts or ())
            chunks.append(Chunk(request.num_computed_tokens, size, True, drafts))
            num_tokens += size - 1
        return chunks, num_tokens

    def _drafts(self, request: DecodeRequest, budget: int) -> tuple[int, ...] | None:
        """Return drafts that fit the budget and the output length, in blocks that are free beyond the watermark."""
        limit = min(budget, request.remaining_output_tokens - 1)
        drafts = self._proposer.propose(request, max(0, limit))
        if drafts:
            num_slots = len(request.token_ids) + len(drafts)
            num_new = -(-num_slots // self._block_size) - len(request.block_table)
            if num_new > 0:
                if self._kv.num_free < num_new + self._watermark_blocks:
                    return ()
                request.block_table.extend(self._kv.allocate(num_new))
        return drafts


def _goes_on(request: DecodeRequest, chunk: Chunk) -> bool:
    return chunk.samples and request.remaining_output_tokens > 1
