"""What every message is, and the parts that several messages carry."""

from __future__ import annotations

import msgspec

from kvrelay.errors import KVRelayError
from kvrelay.protocol.ids import PeerId


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages. A message's tag on the wire is its class name."""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An error on its way to the client. ``retryable``: another node, or a later try, may succeed."""

    code: str
    message: str
    http_status: int = 500
    retryable: bool = False

    @classmethod
    def of(cls, error: KVRelayError) -> ErrorInfo:
        """Describe ``error`` for the wire."""
        return cls(code=error.code, message=error.message, http_status=error.http_status, retryable=error.retryable)


class NodeAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node listens for its peers, and which incarnation of it is meant (``peer``)."""

    peer: PeerId
    address: str


class LinkAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a messager listens for KV frames. ``ipc`` only helps senders with the same ``host_id``."""

    peer: PeerId
    host_id: str
    tcp: str
    ipc: str


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A moment in a request's life: ``name`` at wall-clock time ``at_s``, on ``node``."""

    name: str
    at_s: float
    node: str


class LayerTransfer(msgspec.Struct, frozen=True, array_like=True):
    """KV of one layer on its way: first frame sent, last frame written and verified (wall-clock), payload bytes."""

    layer: int
    first_sent_s: float
    last_written_s: float
    num_bytes: int


WAIT_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the histograms in ``Load.prompt_waits``, in seconds."""


class PromptWait(msgspec.Struct, frozen=True, array_like=True):
    """How long prompts of one class of lengths waited, from arrival until their first token was computed.

    ``counts[i]`` waited for up to ``WAIT_BOUNDS_S[i]`` seconds and for longer than the bound before; the last of them
    for longer than all bounds. ``total_s`` is the sum of all waits.
    """

    counts: list[int]
    total_s: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a node is. All that the router decides by is a field; ``gauges`` and ``counters`` are for people.

    ``num_waiting`` requests wait for KV blocks, with ``waiting_tokens`` tokens in all. ``num_preempted`` of them were
    preempted. ``queued_tokens``: prompt tokens still to compute, of prompts that wait and of those that run; tokens in
    the prefix cache are not counted. ``headroom_blocks``: free blocks that the node keeps for requests that it runs to
    grow into. ``counters`` only grow while the process lives.

    By class of prompt length (``kvrelay.protocol.prompt_lengths``): ``prompt_tokens``, the ``queued_tokens`` of prompts
    with so many to compute, and ``prompt_waits``, which only grow.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_receiving: int = 0
    num_sending: int = 0
    free_blocks: int = 0
    evictable_blocks: int = 0
    used_blocks: int = 0
    queued_tokens: int = 0
    gauges: dict[str, float] = msgspec.field(default_factory=dict)
    counters: dict[str, float] = msgspec.field(default_factory=dict)
    prompt_tokens: list[int] = msgspec.field(default_factory=list)
    prompt_waits: list[PromptWait] = msgspec.field(default_factory=list)
    waiting_tokens: int = 0
    num_preempted: int = 0
    headroom_blocks: int = 0


class Heartbeat(Message, frozen=True, kw_only=True):
    """Node -> router, node -> node it has business with, once per ``heartbeat_s``, whatever the compute thread does.

    The reader takes the peer for alive until ``peer_timeout_s`` later. It renews no lease on a reservation: only
    RenewReservations does.
    """

    load: Load | None = None


class ProtocolViolation(Message, frozen=True, kw_only=True):
    """Anyone -> a peer whose message could not be read.

    The reader logs it: one of the two has a bug or is not kvrelay. The sender no longer listens to the reader.
    """

    reason: str
