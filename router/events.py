"""Events from the HTTP side and the registry to the router's machine, and the deliveries it returns.

Those that a worker process sends or gets (``router/workers``) are tagged: they are its messages.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from kvrelay.errors import KVRelayError, QueueFullError
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import NodeId, RequestId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.request import FinishReason, PromptLogprobs, SamplingParams, TokenLogprobs
from kvrelay.registry.node_entry import NodeEntry

# ---------------------------------------------------------------- events


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    """One choice to generate: a prompt and its sampling params. The id can be reused once the request has ended.

    ``session``: the client's name for requests that share a prefix, or empty. ``answer_id``: the id of the answer that
    the choice is a part of, for operators. ``max_ttft_s``: it is refused if a longer time to first token is predicted;
    None: see ``Limits.ttft_slo_s``.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    session: str = ""
    answer_id: str = ""
    max_ttft_s: float | None = None


class Submitted(msgspec.Struct, frozen=True):
    """Requests to admit all together or not at all. Each gets exactly one terminal delivery, refused ones at once."""

    requests: tuple[NewRequest, ...]


class ClientGone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The client of this request has disconnected."""

    request_id: RequestId


class CancelRequested(msgspec.Struct, frozen=True):
    """An operator cancels this request. Its client gets an error."""

    request_id: RequestId


class ClientsFinished(msgspec.Struct, frozen=True):
    """After ``FinishClients``: all connections of clients have ended."""


class StopMatched(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The text of this request contains a stop string; no further tokens are needed."""

    request_id: RequestId


class DrainRequested(msgspec.Struct, frozen=True):
    """An operator drains this node. ``stay_down``: its supervisor is not to start it again."""

    node_id: NodeId
    stay_down: bool = False


class DumpRequested(msgspec.Struct, frozen=True):
    """An operator wants the recording of this node. DumpReported follows for each of its processes that can be reached.

    ``dump_id``: the operator's name for it.
    """

    node_id: NodeId
    dump_id: str
    with_prompts: bool


class CacheResetRequested(msgspec.Struct, frozen=True):
    """An operator resets the prefix caches of all nodes. ``reset``: a number that no other reset has."""

    reset: int


class NodesFound(msgspec.Struct, frozen=True):
    """The registry was read; ``entries`` are all its nodes."""

    entries: tuple[NodeEntry, ...]


class RegistryLost(msgspec.Struct, frozen=True):
    """The registry cannot be read. NodesFound follows when it can be read again."""

    reason: str


# ---------------------------------------------------------------- actions


class TokensDelivered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The next output tokens, in order, each delivered once. ``num_cached_tokens``: prompt tokens from prefix hits.

    If ``finish_reason`` is set, they are the last and the terminal delivery follows.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


class PromptLogprobsDelivered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The next log probabilities of the prompt, in order, each delivered once and all before the first token."""

    logprobs: PromptLogprobs


class RequestEnded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Terminal: all tokens are delivered, or the request was aborted or stopped."""

    finish_reason: FinishReason


class RequestErrored(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Terminal: the request failed or was refused. ``retry_after_s``: seconds after which the client may retry."""

    error: ErrorInfo
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: KVRelayError) -> RequestErrored:
        """Return the delivery for ``error``."""
        retry_after_s = error.retry_after_s if isinstance(error, QueueFullError) else None
        return cls(ErrorInfo.of(error), error.param, retry_after_s)


Delivery: TypeAlias = TokensDelivered | PromptLogprobsDelivered | RequestEnded | RequestErrored

PARTS = (TokensDelivered, PromptLogprobsDelivered)
"""The kinds of deliveries that are not terminal."""


class Deliver(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Pass ``delivery`` to the submitter of this request."""

    request_id: RequestId
    delivery: Delivery


class FinishClients(msgspec.Struct, frozen=True):
    """Accept no more connections, and let those that there are end with their next answer: ClientsFinished follows."""


class DumpReported(msgspec.Struct, frozen=True):
    """Tell the operator who asked for ``dump_id``: ``process`` has written its recording to ``path``, or the error."""

    dump_id: str
    process: str
    path: str
    error: str


class NodeReset(msgspec.Struct, frozen=True):
    """What became of a reset on one node, of which ``num_blocks`` were published.

    A lost node's process has ended, or it is out of reach of this router; one of an older version cannot be asked.
    """

    node_id: NodeId
    state: Literal["reset", "no_answer", "lost", "unsupported"]
    num_blocks: int = 0


class CacheResetEnded(msgspec.Struct, frozen=True):
    """Tell the operator what each node has answered."""

    reset: int
    nodes: tuple[NodeReset, ...]


RouterAction: TypeAlias = Deliver | FinishClients | DumpReported | CacheResetEnded
"""Actions of the router's own."""

RouterOutbox: TypeAlias = RoleOutbox[RouterAction]
"""The time of the event being handled, and the actions produced so far."""
