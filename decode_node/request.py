"""What D, or a mixed node, knows of one request."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from decode_node.ngram_index import NgramIndex
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.node.request import Holder, NodeRequest
from kvrelay.protocol.ids import PeerId, peer_name
from kvrelay.protocol.messages.prefill_to_decode import HandOff, ReserveBlocks
from kvrelay.protocol.request import RequestSpec, SamplingParams


class DecodeStatus(StrEnum):
    """Where a request stands on D; see the package's picture. RUNNING_DECODE is the only test of "is decoding"."""

    RESERVING = "reserving"
    RECEIVING = "receiving"
    WAITING = "waiting"
    LOADING = "loading"
    PREEMPTED = "preempted"
    RUNNING_PREFILL = "running_prefill"
    RUNNING_DECODE = "running_decode"
    CLOSING = "closing"
    ENDED = "ended"


_OVER = frozenset({DecodeStatus.CLOSING})

TRANSITIONS: Table[DecodeStatus] = {
    DecodeStatus.RESERVING: _OVER | {DecodeStatus.RECEIVING},
    DecodeStatus.RECEIVING: _OVER | {DecodeStatus.RUNNING_DECODE},
    DecodeStatus.WAITING: _OVER | {DecodeStatus.LOADING, DecodeStatus.RUNNING_PREFILL},
    DecodeStatus.PREEMPTED: _OVER | {DecodeStatus.LOADING, DecodeStatus.RUNNING_PREFILL},
    DecodeStatus.LOADING: _OVER | {DecodeStatus.RUNNING_PREFILL},
    DecodeStatus.RUNNING_PREFILL: _OVER | {DecodeStatus.RUNNING_DECODE},
    DecodeStatus.RUNNING_DECODE: _OVER | {DecodeStatus.PREEMPTED},
    DecodeStatus.CLOSING: frozenset({DecodeStatus.ENDED}),
    DecodeStatus.ENDED: frozenset(),
}


class DecodeRequest(NodeRequest[DecodeStatus]):
    """One attempt at a request.

    ``sender`` is the P whose reservation it began as, None if the router sent it to this node. Until the hand-off a
    reserved request's tokens are unknown and ``spec`` is a stand-in with nothing but the maximum output, priority and
    router; ``num_cached_blocks`` of its blocks, with ``num_matched_tokens``, need not come from P. After a preemption
    its first ``num_stored_blocks`` blocks are in the store, once it is no longer ``is_saving``.
    """

    __slots__ = (
        "handed_off",
        "is_saving",
        "kv_arrived",
        "lease_until_s",
        "ngrams",
        "num_cached_blocks",
        "num_matched_tokens",
        "num_preemptions",
        "num_reserved_tokens",
        "num_stored_blocks",
        "priority",
        "sender",
    )

    OVER = frozenset({DecodeStatus.CLOSING, DecodeStatus.ENDED})

    def __init__(
        self, spec: RequestSpec, hashes: list[bytes], first: DecodeStatus, now: float, sender: PeerId | None = None
    ) -> None:
        super().__init__(spec, hashes, Lifecycle(f"request {spec.request_id}", TRANSITIONS, first, now), now)
        self.sender = sender
        self.priority = spec.priority
        self.num_cached_blocks = 0
        self.num_matched_tokens = 0
        self.num_reserved_tokens = 0
        self.num_preemptions = 0
        self.num_stored_blocks = 0
        self.is_saving = False
        self.ngrams: NgramIndex | None = None
        self.lease_until_s = 0.0
        self.kv_arrived = False
        self.handed_off = sender is None

    @property
    def sender_name(self) -> str:
        """The name of its prefill node, for people."""
        return "nobody" if self.sender is None else peer_name(self.sender)

    @classmethod
    def reserved(cls, message: ReserveBlocks, sender: PeerId, now: float) -> Self:
        """Return the request that ``sender`` asks a reservation for. The messager will write to its blocks."""
        stand_in = RequestSpec(
            request_id=message.request_id,
            epoch=message.epoch,
            prompt_token_ids=[],
            sampling=SamplingParams(max_tokens=message.max_tokens, seed=0),
            priority=message.priority,
            router=message.router,
        )
        request = cls(stand_in, message.block_hashes, DecodeStatus.RESERVING, now, sender)
        request.num_reserved_tokens = message.num_tokens
        request.holders.add(Holder.MESSAGER)
        return request

    @property
    def is_reserved(self) -> bool:
        """Whether the prefill node may still cancel it."""
        return self.lifecycle.status in (DecodeStatus.RESERVING, DecodeStatus.RECEIVING)

    def accepts(self, spec: RequestSpec) -> bool:
        """Return whether the reserved blocks are for all tokens of ``spec`` but the newest, whose KV nobody has yet."""
        return len(spec.prompt_token_ids) + len(spec.output_token_ids) - 1 == self.num_reserved_tokens

    def prompt_sources(self) -> dict[str, int]:
        """Return where the KV of its prompt came from on this node, in tokens by source."""
        if self.sender is None:
            return super().prompt_sources()
        num_cached = min(self.num_matched_tokens, self.num_prompt_tokens)
        return {"cached": num_cached, "received": self.num_prompt_tokens - num_cached}

    def hand_off(self, message: HandOff) -> None:
        """Take over from P: the tokens are known now, all but the newest have their KV in the reserved blocks."""
        spec = message.request
        self.spec, self.sampling = spec, spec.sampling
        self.num_cached_tokens = message.num_cached_tokens
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.token_ids = [*spec.prompt_token_ids, *spec.output_token_ids]
        self.num_computed_tokens = len(self.token_ids) - 1
        self.priority = spec.priority
        self.handed_off = True
