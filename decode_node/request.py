"""What D, or a mixed node, knows of one request."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Self

from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Mark
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.messages.node_to_router import RequestOutput, RequestTimeline
from kvrelay.protocol.messages.prefill_to_decode import HandOff, ReserveBlocks
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence

if TYPE_CHECKING:
    from decode_node.speculate import NgramIndex


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
_OVER_STATUSES = frozenset({DecodeStatus.CLOSING, DecodeStatus.ENDED})

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


class DecodeRequest(Sequence):
    """One attempt at a request.

    ``sender`` is the P whose reservation it began as, None if the router sent it here. Until the hand-off a reserved
    request's tokens are unknown and ``spec`` stands in with the maximum output only; ``num_cached_blocks`` of its
    blocks need not come from P. After a preemption its first ``num_stored_blocks`` blocks are in the store, once it
    is no longer ``is_saving``; while it ``is_loading`` a read from the store fills its blocks.
    """

    __slots__ = (
        "arrival_s",
        "handed_off",
        "hashes",
        "is_loading",
        "is_saving",
        "kv_arrived",
        "lease_until_s",
        "lifecycle",
        "marks",
        "messager_holds",
        "ngrams",
        "num_cached_blocks",
        "num_cached_tokens",
        "num_preemptions",
        "num_reserved_tokens",
        "num_stored_blocks",
        "priority",
        "sender",
    )

    def __init__(
        self, spec: RequestSpec, hashes: list[bytes], first: DecodeStatus, now: float, sender: PeerId | None = None
    ) -> None:
        super().__init__(spec)
        self.hashes = hashes
        self.lifecycle = Lifecycle(f"request {spec.request_id}", TRANSITIONS, first, now)
        self.sender = sender
        self.arrival_s = now
        self.priority = spec.priority
        self.num_cached_blocks = 0
        self.num_reserved_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_stored_blocks = 0
        self.is_saving = False
        self.is_loading = False
        self.ngrams: NgramIndex | None = None
        self.lease_until_s = 0.0
        self.kv_arrived = False
        self.handed_off = sender is None
        self.messager_holds = False
        self.marks: list[tuple[str, float]] = []

    @classmethod
    def reserved(cls, message: ReserveBlocks, sender: PeerId, now: float) -> Self:
        """Return the request that ``sender`` asks a reservation for."""
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
        return request

    @property
    def status(self) -> DecodeStatus:
        """Where it stands."""
        return self.lifecycle.status

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be sent about it."""
        return self.lifecycle.status in _OVER_STATUSES

    @property
    def is_reserved(self) -> bool:
        """Whether it is its sender's to cancel."""
        return self.lifecycle.status in (DecodeStatus.RESERVING, DecodeStatus.RECEIVING)

    @property
    def next_position(self) -> int:
        """Where its next chunk begins: the newest token is always computed, for the next one's logits."""
        return min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to compute before the next output token: one at least."""
        return len(self.token_ids) - self.next_position

    def accepts(self, spec: RequestSpec) -> bool:
        """Return whether the reserved blocks are for all tokens of ``spec`` but the newest, whose KV nobody has yet."""
        return len(spec.prompt_token_ids) + len(spec.output_token_ids) - 1 == self.num_reserved_tokens

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

    def begin_decode(self, now: float) -> None:
        """All its KV but the newest token's is here."""
        self.lifecycle.move(DecodeStatus.RUNNING_DECODE, now)
        self.mark("decode", now)

    def take(self, sampled: SampledTokens) -> RequestOutput:
        """Append what was sampled, up to the token that ends the request; return what the router is to know of it."""
        spec, index, finish = self.spec, len(self.token_ids) - self.num_prompt_tokens, None
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        for num_taken, token in enumerate(token_ids, 1):
            self.token_ids.append(token)
            finish = self.finish_reason()
            if finish is not None:
                token_ids, logprobs = token_ids[:num_taken], logprobs[:num_taken]
                break
        return RequestOutput(
            request_id=spec.request_id,
            epoch=spec.epoch,
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish[0] if finish else None,
            stop_token_id=finish[1] if finish else None,
            num_cached_tokens=self.num_cached_tokens,
        )

    def mark(self, name: str, now: float) -> None:
        """Note a moment for the timeline."""
        self.marks.append((name, now))

    def timeline(self, node: str) -> RequestTimeline:
        """Return its moments on this node for the router."""
        marks = [Mark(name, at_s, node) for name, at_s in self.marks]
        return RequestTimeline(request_id=self.spec.request_id, epoch=self.spec.epoch, marks=marks)
