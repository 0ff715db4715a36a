"""The base class of messages, parts that several messages contain, and messages that several roles send."""

from __future__ import annotations

import msgspec

from kvrelay.errors import KVRelayError
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.quantities import Amount, Moment, Speed


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base class of all messages. A message's tag on the wire is its class name."""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An error for the client. ``retryable``: the request may succeed on another node or in a later attempt."""

    code: str
    message: str
    http_status: int = 500
    retryable: bool = False

    @classmethod
    def of(cls, error: KVRelayError) -> ErrorInfo:
        """Describe ``error`` for the wire."""
        return cls(code=error.code, message=error.message, http_status=error.http_status, retryable=error.retryable)


class NodeAddress(msgspec.Struct, frozen=True, kw_only=True):
    """The address at which a node listens for its peers; ``peer`` is the node's name and incarnation."""

    peer: PeerId
    address: str


class LinkAddress(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses at which a messager listens for frames. ``ipc`` is only for senders with the same ``host_id``."""

    peer: PeerId
    host_id: str
    tcp: str
    ipc: str


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """One event of a request's timeline: ``name`` happened on ``node`` at wall-clock time ``at_s`` (seconds)."""

    name: str
    at_s: Moment
    node: str


class LayerTransfer(msgspec.Struct, frozen=True, array_like=True):
    """Transfer of one layer: wall-clock times of the first frame sent and the last frame written, and payload bytes."""

    layer: int
    first_sent_s: Moment
    last_written_s: Moment
    num_bytes: int


WAIT_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the histograms in ``Load.prompt_waits``, in seconds."""


class PromptWait(msgspec.Struct, frozen=True, array_like=True):
    """Histogram of the waits of prompts of one length class, from arrival until their first token was computed.

    ``counts[i]`` prompts waited at most ``WAIT_BOUNDS_S[i]`` seconds and longer than the bound before. The last count
    is of prompts that waited longer than all bounds. ``total_s`` is the sum of all waits.
    """

    counts: list[int]
    total_s: Amount


class HistogramReport(msgspec.Struct, frozen=True, array_like=True):
    """A histogram of a node. ``name`` gives its bounds (``kvrelay.protocol.histograms.BOUNDS``).

    ``label``: the kind of link for those of transfers, else empty. ``counts[i]`` are the values up to bound ``i`` and
    above the bound before; the last count is of those above all. ``total`` is the sum of all values.
    """

    name: str
    label: str
    counts: list[int]
    total: Amount


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a node. The router decides by the fields; ``gauges``, ``counters`` and ``histograms`` are for metrics
    only.

    ``num_waiting`` requests wait for KV blocks, with ``waiting_tokens`` tokens in all; ``num_preempted`` of them were
    preempted. ``queued_tokens``: uncached prompt tokens still to compute, of waiting and running prompts.
    ``headroom_blocks``: free blocks kept for running requests. ``counters`` and ``histograms`` never decrease while the
    process lives.

    By class of prompt length (``kvrelay.protocol.prompt_lengths``): ``prompt_tokens`` are the ``queued_tokens`` of each
    class, ``prompt_waits`` histograms of waits, which never decrease.

    ``prefill_tokens_per_s``: prompt tokens computed per second of the steps that compute any, as measured lately; 0:
    not measured in the last minute. ``link_bytes_per_s``: payload bytes moved per second while bytes are under way, by
    the name of the decode node; without the links that moved nothing in the last minute.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_receiving: int = 0
    num_sending: int = 0
    free_blocks: int = 0
    evictable_blocks: int = 0
    used_blocks: int = 0
    queued_tokens: int = 0
    gauges: dict[str, Amount] = msgspec.field(default_factory=dict)
    counters: dict[str, Amount] = msgspec.field(default_factory=dict)
    prompt_tokens: list[int] = msgspec.field(default_factory=list)
    prompt_waits: list[PromptWait] = msgspec.field(default_factory=list)
    waiting_tokens: int = 0
    num_preempted: int = 0
    headroom_blocks: int = 0
    histograms: list[HistogramReport] = msgspec.field(default_factory=list)
    prefill_tokens_per_s: Speed = 0.0
    link_bytes_per_s: dict[str, Speed] = msgspec.field(default_factory=dict)


class Heartbeat(Message, frozen=True, kw_only=True):
    """Once per ``heartbeat_s``, independent of the compute thread: node -> router, with ``load``; and without ``load``:
    D -> each P with reservations on it, messager -> messager on each link, and, with a Redis registry, router -> node.

    The reader resets the peer's deadline, ``peer_timeout_s``, as for any other message. A router that does not know the
    node answers RegisterAgain; a node that is not registered with the router answers Register. A heartbeat does not
    renew the lease of a reservation. Only RenewReservations does.
    """

    load: Load | None = None


class ProtocolViolation(Message, frozen=True, kw_only=True):
    """Any process -> a peer that sent a message which cannot be decoded, or that uses the name of another peer.

    The reader logs ``reason``. Both treat each other as lost, and then go on with the messages that follow.
    """

    reason: str
