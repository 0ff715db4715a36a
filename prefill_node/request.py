"""What P knows of one request."""

from __future__ import annotations

from enum import StrEnum

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.protocol.ids import Attempt, PeerId
from kvrelay.protocol.messages.base import LayerTransfer, Mark, NodeAddress
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.messages.node_to_messager import KVSpan
from kvrelay.protocol.messages.node_to_router import DecodeNeeded, RequestOutput, RequestTimeline
from kvrelay.protocol.request import RequestSpec, Sequence


class PrefillStatus(StrEnum):
    """Where a request stands on P; see the package's picture."""

    QUEUED = "queued"
    LOADING = "loading"
    RUNNING_PREFILL = "running_prefill"
    SENDING = "sending"
    CLOSING = "closing"
    ENDED = "ended"


_CLOSING, _ENDED = PrefillStatus.CLOSING, PrefillStatus.ENDED

TRANSITIONS: Table[PrefillStatus] = {
    PrefillStatus.QUEUED: frozenset({PrefillStatus.LOADING, PrefillStatus.RUNNING_PREFILL, _CLOSING}),
    PrefillStatus.LOADING: frozenset({PrefillStatus.RUNNING_PREFILL, _CLOSING}),
    PrefillStatus.RUNNING_PREFILL: frozenset({PrefillStatus.SENDING, _CLOSING}),
    PrefillStatus.SENDING: frozenset({_CLOSING, _ENDED}),
    PrefillStatus.CLOSING: frozenset({_ENDED}),
    PrefillStatus.ENDED: frozenset(),
}


class Holder(StrEnum):
    """Who uses a request's blocks. They are given back when nobody does."""

    REQUEST = "request"
    STEP = "step"
    MESSAGER = "messager"
    STORE = "store"


class Reservation(StrEnum):
    """How far P has come with the decode node."""

    NONE = "none"
    ASKED = "asked"
    REFUSED = "refused"
    GRANTED = "granted"


class PrefillRequest:
    """One attempt at a request. Its first ``num_signalled_blocks`` blocks are spoken for in signals to the messager."""

    __slots__ = (
        "decode_needed",
        "decode_node",
        "hashes",
        "holders",
        "layers",
        "lifecycle",
        "marks",
        "num_cached_tokens",
        "num_signalled_blocks",
        "reservation",
        "sequence",
        "spec",
    )

    def __init__(self, spec: RequestSpec, decode_node: NodeAddress | None, hashes: list[bytes], now: float) -> None:
        self.spec = spec
        self.decode_node = decode_node
        self.hashes = hashes
        self.sequence = Sequence(spec)
        self.lifecycle = Lifecycle(f"request {spec.request_id}", TRANSITIONS, PrefillStatus.QUEUED, now)
        self.holders: set[Holder] = set()
        self.reservation = Reservation.NONE
        self.decode_needed: DecodeNeeded | None = None
        self.num_cached_tokens = 0
        self.num_signalled_blocks = 0
        self.marks: list[tuple[str, float]] = []
        self.layers: list[LayerTransfer] = []

    @property
    def attempt(self) -> Attempt:
        """The key of this try."""
        return self.spec.attempt

    @property
    def status(self) -> PrefillStatus:
        """Where it stands."""
        return self.lifecycle.status

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be sent about it."""
        return self.status in (PrefillStatus.CLOSING, PrefillStatus.ENDED)

    @property
    def target(self) -> NodeAddress:
        """The decode node. Raises LocalProtocolError for a request that needs none."""
        if self.decode_node is None:
            raise LocalProtocolError("no decode node", request_id=self.spec.request_id)
        return self.decode_node

    def holds_with(self, peer: PeerId) -> bool:
        """Return whether ``peer`` has been asked for its reservation, or has granted it."""
        is_held = self.reservation in (Reservation.ASKED, Reservation.GRANTED)
        return is_held and self.decode_node is not None and self.decode_node.peer == peer

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV is computed here and needed on D: all that were given, but not the one sampled after them."""
        return len(self.spec.prompt_token_ids) + len(self.spec.output_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens still to compute for the first output token: one at least, however much is cached."""
        return self.sequence.num_tokens - self.next_position

    @property
    def next_position(self) -> int:
        """Where the next chunk begins: the newest token is always computed, for its logits."""
        return min(self.sequence.num_computed_tokens, self.sequence.num_tokens - 1)

    def take_first_token(self, sampled: SampledTokens) -> RequestOutput:
        """Append the prompt's output token; return what the router is to know of it."""
        sequence, index = self.sequence, self.sequence.num_output_tokens
        sequence.token_ids.extend(sampled.token_ids)
        finish = sequence.finish_reason()
        return RequestOutput(
            request_id=self.spec.request_id,
            epoch=self.spec.epoch,
            index=index,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            finish_reason=finish[0] if finish else None,
            stop_token_id=finish[1] if finish else None,
            num_cached_tokens=self.num_cached_tokens,
        )

    def mark(self, name: str, now: float) -> None:
        """Note a moment for the timeline."""
        self.marks.append((name, now))

    def timeline(self, node: str) -> RequestTimeline:
        """Return its moments on P, and its transfer's, for the router."""
        return RequestTimeline(
            request_id=self.spec.request_id,
            epoch=self.spec.epoch,
            marks=[Mark(name, at_s, node) for name, at_s in self.marks],
            layers=self.layers,
        )

    def take_span(self, num_blocks: int) -> KVSpan | None:
        """Return the blocks up to ``num_blocks`` that no span told of yet, or None if there are none."""
        first = self.num_signalled_blocks
        if num_blocks <= first:
            return None
        self.num_signalled_blocks = num_blocks
        return KVSpan(
            self.spec.request_id, self.spec.epoch, first, self.sequence.block_table[first:num_blocks].tolist()
        )
