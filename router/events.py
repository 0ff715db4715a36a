"""What the HTTP side tells the router's machine, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from kvrelay.errors import KVRelayError, QueueFullError
from kvrelay.machine.outbox import RoleOutbox
from kvrelay.protocol.ids import NodeId
from kvrelay.protocol.messages.base import ErrorInfo
from kvrelay.protocol.request import FinishReason, SamplingParams, TokenLogprobs
from kvrelay.registry.node_entry import NodeEntry

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class NewRequest:
    """One choice a client wants: a prompt and how to go on from it. Its id is free as soon as the request has ended."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Submitted:
    """A client asks for all of these or none. Each gets exactly one terminal delivery, refused ones at once."""

    requests: tuple[NewRequest, ...]


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody waits for this request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The text of this request has come to a stop string; its further tokens are of no use."""

    request_id: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator wants this node out."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class NodesFound:
    """The registry was read: these are the nodes in it, all of them."""

    entries: tuple[NodeEntry, ...]


@dataclass(frozen=True, slots=True)
class RegistryLost:
    """The registry cannot be read. NodesFound follows when it can."""

    reason: str


# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class TokensDelivered:
    """The next output tokens, in order, each one once. ``num_cached_tokens``: prompt tokens no node had to compute.

    With a ``finish_reason`` they are the last, and the terminal delivery follows.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Terminal: all tokens are delivered, or no more are wanted."""

    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RequestErrored:
    """Terminal: it ends with this error. ``retry_after_s``: when the client may try again."""

    error: ErrorInfo
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: KVRelayError) -> RequestErrored:
        """Describe ``error``."""
        retry_after_s = error.retry_after_s if isinstance(error, QueueFullError) else None
        return cls(ErrorInfo.of(error), error.param, retry_after_s)


Delivery: TypeAlias = TokensDelivered | RequestEnded | RequestErrored


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand ``delivery`` to whoever waits for this request."""

    request_id: str
    delivery: Delivery


RouterOutbox: TypeAlias = RoleOutbox[Deliver]
"""The time of the event that the router handles, and the actions it has led to."""
