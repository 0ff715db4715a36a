"""Prefill, decode and mixed nodes -> router."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import Attempt, NodeId, PeerId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo, LayerTransfer, Mark, Message
from kvrelay.protocol.quantities import Duration
from kvrelay.protocol.request import FinishReason, PromptLogprobs, TokenLogprobs


class Register(Message, frozen=True, kw_only=True):
    """Node -> router, when the node can serve. With a static registry it is repeated once per ``heartbeat_s`` until
    Registered arrives, and after RegisterAgain. With a Redis registry it answers a Heartbeat of a new router. D repeats
    it when a prefill node that no router has named asks for blocks.

    The reader compares role, protocol version, model and KV geometry and answers Registered or RegistrationRefused. If
    another registered node has the name, the answer waits until that node sends a heartbeat or is lost. ``session``
    rises each time the node loses a router and drops its requests. A reader that knows another ``session`` retries the
    node's requests. Token ids are below ``vocab_size``; the default accepts any 32-bit id. ``resets_prefix_cache`` and
    ``can_dump``: the node can read ResetPrefixCache and Dump.
    """

    node_id: NodeId
    incarnation: str
    role: str
    address: str
    pid: int
    model: str
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    geometry: KVGeometry
    session: int = 0
    vocab_size: int = 1 << 32
    prefill_order: str = "fifo"
    resets_prefix_cache: bool = False
    can_dump: bool = False


class AttemptsHeld(Message, frozen=True, kw_only=True):
    """Node -> router that wants it and has registered it anew, if the node has requests of that router.

    A router that lost the node and found it again has begun these requests elsewhere, and the node knows nothing of it:
    it may have stood still. The reader answers Abort for each of ``attempts`` that is over or not the sender's.
    """

    attempts: list[Attempt]


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """New output tokens of one request; ``index`` is the position of the first among all its output tokens.

    With a ``finish_reason`` it is the request's terminal message. ``num_cached_tokens`` is the number of prompt tokens
    that were found in a prefix cache or in the store.
    """

    request_id: RequestId
    epoch: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


class TokensOut(Message, frozen=True, kw_only=True):
    """Node -> router, once per step for each router that has output in it.

    The reader orders the tokens of a request by ``index``, because P's first token and D's second arrive over different
    connections, and delivers them to the clients. It answers tokens of an attempt that is over with Abort.
    """

    outputs: list[RequestOutput]


class PromptLogprobsOut(Message, frozen=True, kw_only=True):
    """Node -> router, after each step that computed prompt tokens of a request with ``num_prompt_logprobs``: once for
    each piece of bounded size, in the order of the positions, and before the request's next output token.

    The reader delivers what it has not delivered before: an attempt begins again with the second prompt token. It fails
    an attempt whose output token comes before all of them.
    """

    request_id: RequestId
    epoch: int
    logprobs: PromptLogprobs


class RequestFailed(Message, frozen=True, kw_only=True):
    """Node -> router: this attempt has failed. Only RequestTimeline follows.

    The reader sends Abort to the attempt's other node. It retries if ``error.retryable`` and attempts are left
    (``router.max_attempts``), else it ends the request with this error.
    """

    request_id: RequestId
    epoch: int
    error: ErrorInfo


class RequestPreempted(Message, frozen=True, kw_only=True):
    """D or mixed node -> router: the request was preempted and waits for ``num_blocks`` blocks.

    Sent when the save of its KV is done, or at once if nothing is saved; not sent if the request has resumed by then.
    The save may be incomplete: blocks can be missing because writing failed or the staging memory was full, and blocks
    that another request's save is still writing count as saved. A node recomputes what it does not find in the store.
    The reader may move the request to a node with room. Else the sender resumes it when it has room. A request that has
    ended is answered with Abort.
    """

    request_id: RequestId
    epoch: int
    num_blocks: int


class DecodeNeeded(Message, frozen=True, kw_only=True):
    """P -> router: the decode node refused the reservation for now, did not answer within ``transfer.timeout_s``, or is
    lost. Repeated once per ``transfer.timeout_s`` until AssignDecode arrives.

    The reader chooses a decode node that has not refused, or any again after ``retry_after_s`` if all have refused, and
    sends AssignDecode. If the attempt is over it sends Abort.
    """

    request_id: RequestId
    epoch: int
    refused_by: PeerId
    reason: str
    retry_after_s: Duration


class RequestTimeline(Message, frozen=True, kw_only=True):
    """Node -> router, when the node has freed the blocks of an attempt. Only for ``/cluster/requests/{request_id}``.

    The reader merges it with the timelines of the other attempts and nodes.
    """

    request_id: RequestId
    epoch: int
    marks: list[Mark]
    layers: list[LayerTransfer] = msgspec.field(default_factory=list)


class Leaving(Message, frozen=True, kw_only=True):
    """Node -> router, when the node was told to stop, by a signal or by Drain.

    The reader sends it no new requests. The node finishes its requests or ends them with a retryable RequestFailed.
    """


class PrefixCacheChanged(Message, frozen=True, kw_only=True):
    """Node -> router that wants it, when the node is registered and then with heartbeats, if anything has changed.

    ``added`` and ``removed`` are prefix keys, ``PREFIX_KEY_BYTES`` each, one after another. ``number`` is 0 in the
    first message after a registration or a reset, which has the keys of all published blocks, and rises by one with
    each message. The reader routes prompts by it. If it misses a message, it knows nothing of the node's prefix cache
    any more and answers Registered.
    """

    number: int
    added: bytes
    removed: bytes = b""


class Dumped(Message, frozen=True, kw_only=True):
    """Node -> router, answers Dump, for the node and for its messager: the file of ``process``, or the ``error``.

    The reader tells the operator who waits for ``dump_id``, if he still does.
    """

    dump_id: str
    process: str
    path: str
    error: str


class PrefixCacheReset(Message, frozen=True, kw_only=True):
    """Node -> router, answers ResetPrefixCache, after PrefixCacheChanged to each router that wants it.

    ``num_blocks`` were published. The reader reports the node's answer to the operator, and forgets what it expected
    to be in the node's prefix cache.
    """

    reset: int
    num_blocks: int


class Drained(Message, frozen=True, kw_only=True):
    """Node -> router, last message of a node that is leaving: it has no requests any more.

    The reader removes the node.
    """


NodeToRouter: TypeAlias = (
    TokensOut
    | PromptLogprobsOut
    | Register
    | AttemptsHeld
    | RequestFailed
    | RequestPreempted
    | DecodeNeeded
    | RequestTimeline
    | PrefixCacheChanged
    | PrefixCacheReset
    | Leaving
    | Dumped
    | Drained
)
