"""Prefill, decode and mixed nodes -> router."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import NodeId, PeerId
from kvrelay.protocol.messages.base import ErrorInfo, LayerTransfer, Mark, Message
from kvrelay.protocol.request import FinishReason, TokenLogprobs


class Register(Message, frozen=True, kw_only=True):
    """Node -> router, when it can serve, and again whenever the router asks.

    The reader compares geometry, model and protocol with its other nodes and answers Registered or RegistrationRefused.
    ``session`` rises when the node takes a router for lost and drops what it held for it: a reader that knows another
    gives the node's requests to others. Token ids are below ``vocab_size``; a node that does not say takes any u32.
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


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """New output tokens of one request; ``index`` is the place of the first among all its output tokens.

    ``finish_reason`` makes it the request's terminal message. ``num_cached_tokens`` counts prompt tokens that
    no node had to compute.
    """

    request_id: str
    epoch: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


class TokensOut(Message, frozen=True, kw_only=True):
    """Node -> router, once per step: all tokens of that step.

    The reader puts them in order by ``index`` (P's first token and D's second come over different connections) and
    hands them to the clients.
    """

    outputs: list[RequestOutput]


class RequestFailed(Message, frozen=True, kw_only=True):
    """Node -> router: this attempt is over, and the node has nothing more to say about it.

    The reader tries again elsewhere if ``error.retryable``, else ends the request with this error.
    """

    request_id: str
    epoch: int
    error: ErrorInfo


class RequestPreempted(Message, frozen=True, kw_only=True):
    """D or mixed -> router: it had to take the blocks from a request, which waits for ``num_blocks`` of them again.

    Sent when the save of its KV is over, or at once if there is nothing to save. Blocks that another request's save is
    writing at that time count as saved: a node that does not find them computes them. The reader may give the request
    to a node that has room now. If it does not, the sender resumes it as soon as it has room itself.
    """

    request_id: str
    epoch: int
    num_blocks: int


class DecodeNeeded(Message, frozen=True, kw_only=True):
    """P -> router: the decode node refused the reservation or is lost.

    The reader picks another (or, if there is none, the same after ``retry_after_s``) and sends AssignDecode, or Abort.
    """

    request_id: str
    epoch: int
    refused_by: PeerId
    reason: str
    retry_after_s: float


class RequestTimeline(Message, frozen=True, kw_only=True):
    """Node -> router, when the node's part of a request is over. For people: nothing depends on it.

    The reader merges it with the other node's and keeps it for a while.
    """

    request_id: str
    epoch: int
    marks: list[Mark]
    layers: list[LayerTransfer] = msgspec.field(default_factory=list)


class Leaving(Message, frozen=True, kw_only=True):
    """Node -> router, when its operator asked it to stop.

    The reader sends it nothing new; what it has it will finish, or hand back as a retryable RequestFailed.
    """


class Drained(Message, frozen=True, kw_only=True):
    """Node -> router: it is leaving and holds no request any more.

    The reader forgets the node.
    """


NodeToRouter: TypeAlias = (
    TokensOut | Register | RequestFailed | RequestPreempted | DecodeNeeded | RequestTimeline | Leaving | Drained
)
