"""Router -> prefill, decode and mixed nodes."""

from __future__ import annotations

from kvrelay.protocol.ids import PeerId, RequestId
from kvrelay.protocol.messages.base import Message, NodeAddress
from kvrelay.protocol.request import RequestSpec


class Registered(Message, frozen=True, kw_only=True):
    """Router -> node, answers Register.

    The reader sends heartbeats from now on. With a static registry, another ``router_incarnation`` than before means
    that the router was restarted and its clients are disconnected. The reader then ends all its requests.

    ``wants_prefixes``: the reader reports its prefix cache in PrefixCacheChanged. ``wants_attempts``: it reports the
    router's requests that it already has in AttemptsHeld, if it was not registered with this router.
    """

    router_incarnation: str
    wants_prefixes: bool = False
    wants_attempts: bool = False


class RegistrationRefused(Message, frozen=True, kw_only=True):
    """Router -> node, answers Register: the node does not match the cluster, or another live node has its name.

    The reader logs ``reason`` and exits with status 2.
    """

    reason: str


class RegisterAgain(Message, frozen=True, kw_only=True):
    """Router -> node, answers a Heartbeat of a node that is not registered: the router was restarted, or lost the node.

    The reader sends Register.
    """


class PrefillNodes(Message, frozen=True, kw_only=True):
    """Router -> D, after Registered, and when a prefill node has registered or is gone.

    The reader grants reservations only to ``peers`` and to those that its other routers have named. Requests from
    others are refused for now, and D registers again: this message may be on its way, or lost. Reservations made
    before are not affected.
    """

    peers: list[PeerId]


class Prefill(Message, frozen=True, kw_only=True):
    """Router -> P, for each attempt at a request on a prefill node. ``decode_node`` is None if one token is enough.

    The reader computes the KV of all tokens in ``request``, including output tokens of earlier attempts, reserves
    blocks on the decode node, transfers the KV and hands the request off. It must send the router the next output token
    (TokensOut) or RequestFailed.
    """

    request: RequestSpec
    decode_node: NodeAddress | None


class AssignDecode(Message, frozen=True, kw_only=True):
    """Router -> P, answers DecodeNeeded.

    The reader asks ``decode_node`` for a reservation. KV that it has already computed stays valid.
    """

    request_id: RequestId
    epoch: int
    decode_node: NodeAddress


class Generate(Message, frozen=True, kw_only=True):
    """Router -> mixed node, for each attempt at a request; router -> D, if D computes the prompt itself or takes over a
    request that another node has preempted.

    The reader serves the whole request. It must send the router all further output tokens, the last with a
    ``finish_reason``, or RequestFailed.
    """

    request: RequestSpec


class Abort(Message, frozen=True, kw_only=True):
    """Router -> each node of an attempt that is over for the router: the client disconnected, a stop string matched,
    the request timed out, failed on its other node or moved, or the router is stopping. Also the answer to a message
    about an attempt that is already over.

    The reader ends the request without an answer other than RequestTimeline, and frees its blocks when nothing uses
    them. P also sends D CancelReservation. D sends P nothing, because the router sends an Abort to both.
    """

    request_id: RequestId
    epoch: int


class Dump(Message, frozen=True, kw_only=True):
    """Router -> node that ``can_dump``, when an operator asks for its recording.

    The reader writes it to a file on its host, without tokens unless ``with_prompts``, has its messager do the same,
    and answers Dumped for each of both.
    """

    dump_id: str
    with_prompts: bool


class ResetPrefixCache(Message, frozen=True, kw_only=True):
    """Router -> node, when an operator resets the prefix caches; repeated with the router's heartbeats until answered.

    The reader matches nothing any more of the KV that is in its pool now, and publishes none of it. Requests in
    progress keep their blocks. It answers PrefixCacheReset. What is in the KV store stays there.
    """

    reset: int


class Drain(Message, frozen=True, kw_only=True):
    """Router -> node, when an operator drains it over HTTP. The router sends the node no new requests.

    The reader sends Leaving, refuses new requests and reservations, finishes its requests, sends Drained and exits.
    Requests that are not finished after ``cluster.drain_timeout_s`` end with a retryable RequestFailed. If it is to
    stay down, its exit status tells ``kvrelay up`` not to start it again.
    """

    stay_down: bool = False
