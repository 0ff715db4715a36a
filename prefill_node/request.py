"""What P knows of one request."""

from __future__ import annotations

from enum import StrEnum

from kvrelay.errors import LocalProtocolError
from kvrelay.machine.lifecycle import Lifecycle, Table
from kvrelay.node.request import NodeRequest
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import LayerTransfer, NodeAddress
from kvrelay.protocol.messages.node_to_messager import KVSpan
from kvrelay.protocol.messages.node_to_router import DecodeNeeded
from kvrelay.protocol.request import RequestSpec


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


class Reservation(StrEnum):
    """How far P has come with the decode node."""

    NONE = "none"
    ASKED = "asked"
    REFUSED = "refused"
    GRANTED = "granted"


class PrefillRequest(NodeRequest[PrefillStatus]):
    """One attempt at a request. Its first ``num_signalled_blocks`` blocks were named in signals to the messager."""

    __slots__ = ("decode_needed", "decode_node", "layers", "num_signalled_blocks", "reservation")

    OVER = frozenset({_CLOSING, _ENDED})

    def __init__(self, spec: RequestSpec, decode_node: NodeAddress | None, hashes: list[bytes], now: float) -> None:
        lifecycle = Lifecycle(f"request {spec.request_id}", TRANSITIONS, PrefillStatus.QUEUED, now)
        super().__init__(spec, hashes, lifecycle, now)
        self.decode_node = decode_node
        self.reservation = Reservation.NONE
        self.decode_needed: DecodeNeeded | None = None
        self.num_signalled_blocks = 0
        self.layers: list[LayerTransfer] = []

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

    def layer_transfers(self) -> list[LayerTransfer]:
        """Return how its KV travelled to D, layer by layer."""
        return self.layers

    def take_span(self, num_blocks: int) -> KVSpan | None:
        """Return the blocks up to ``num_blocks`` that no span named yet, or None if there are none."""
        first = self.num_signalled_blocks
        if num_blocks <= first:
            return None
        self.num_signalled_blocks = num_blocks
        return KVSpan(self.spec.request_id, self.spec.epoch, first, self.block_table[first:num_blocks])
