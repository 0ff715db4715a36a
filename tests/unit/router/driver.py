"""Drives a router machine by hand: events in, actions sorted into what tests look at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from fake_nodes import register

from kvrelay.config.sections import RoutingPolicy
from kvrelay.machine.contract import CancelTimer, Exit, Received, Send, SetTimer, Started, TimerFired
from kvrelay.protocol.ids import NodeId, PeerId, RequestId, peer_id
from kvrelay.protocol.messages.base import ErrorInfo, Message
from kvrelay.protocol.messages.node_to_router import DecodeNeeded, RequestFailed, RequestOutput, TokensOut
from kvrelay.protocol.messages.router_to_node import Generate, Prefill
from kvrelay.protocol.request import FinishReason, RequestSpec, SamplingParams
from router.events import (
    Deliver,
    Delivery,
    FinishClients,
    NewRequest,
    RequestEnded,
    RequestErrored,
    Submitted,
    TokensDelivered,
)
from router.expected_nodes import ExpectedNode
from router.limits import Limits
from router.machine import RouterEvent, RouterMachine, RouterSettings

M = TypeVar("M", bound=Message)


def peer(name: str, incarnation: str = "a") -> str:
    return peer_id(name, incarnation)


def new_request(request_id: str = "r", *, max_tokens: int = 8, prompt: list[int] | None = None) -> NewRequest:
    return NewRequest(RequestId(request_id), prompt or [1, 2, 3], SamplingParams(max_tokens=max_tokens, seed=0))


class Driver:
    def __init__(
        self,
        nodes: str = "",
        *,
        limits: Limits | None = None,
        policy: RoutingPolicy = "least_loaded",
        first_epoch: int = 0,
        local_prefill_tokens: int | None = None,
        expected_nodes: Mapping[NodeId, ExpectedNode] | None = None,
    ) -> None:
        settings = RouterSettings(
            model="demo",
            incarnation="r1",
            first_epoch=first_epoch,
            limits=limits or Limits(),
            prefill_routing=policy,
            decode_routing=policy,
            local_prefill_tokens=local_prefill_tokens,
            expected_nodes=expected_nodes,
            self_check="fatal",
        )
        self.machine = RouterMachine(settings)
        self.now = 1000.0
        self.sent: list[tuple[str, Message]] = []
        self.delivered: dict[str, list[Delivery]] = defaultdict(list)
        self.timers: dict[Hashable, float] = {}
        self.num_finishes = 0
        """How often clients were to finish."""
        self.exited = False
        self.do(Started())
        for name in nodes.split():
            self.join(name)

    # ------------------------------------------------------------ events

    def do(self, event: RouterEvent) -> Sequence[object]:
        actions = self.machine.handle(event, self.now)
        for action in actions:
            match action:
                case Send(peer=to, message=message):
                    self.sent.append((to, message))
                case Deliver(request_id=request_id, delivery=delivery):
                    self.delivered[request_id].append(delivery)
                case SetTimer(key=key, at_s=at_s):
                    self.timers[key] = at_s
                case CancelTimer(key=key):
                    self.timers.pop(key, None)
                case FinishClients():
                    self.num_finishes += 1
                case Exit():
                    self.exited = True
        return actions

    def join(self, name: str, incarnation: str = "a", **fields: Any) -> None:
        role = {"p": "prefill", "d": "decode", "m": "mixed"}[name[0]]
        self.receive(peer(name, incarnation), register(name, role, incarnation, **fields))

    def receive(self, from_peer: str, message: Message) -> None:
        self.do(Received(PeerId(from_peer), message))

    def submit(self, *requests: NewRequest) -> None:
        self.do(Submitted(requests or (new_request(),)))

    def tokens(self, name: str, index: int, token_ids: list[int], **fields: Any) -> None:
        """The first incarnation of ``name`` sends tokens."""
        self.tokens_from(peer(name), index, token_ids, **fields)

    def tokens_from(
        self,
        from_peer: str,
        index: int,
        token_ids: list[int],
        *,
        epoch: int = 1,
        finish: FinishReason | None = None,
        request_id: str = "r",
        num_cached_tokens: int = 0,
    ) -> None:
        output = RequestOutput(
            request_id=RequestId(request_id),
            epoch=epoch,
            index=index,
            token_ids=token_ids,
            finish_reason=finish,
            num_cached_tokens=num_cached_tokens,
        )
        self.receive(from_peer, TokensOut(outputs=[output]))

    def fail(self, name: str, *, epoch: int = 1, retryable: bool = True, request_id: str = "r") -> None:
        error = ErrorInfo(code="engine_error", message="step failed", retryable=retryable)
        self.receive(peer(name), RequestFailed(request_id=RequestId(request_id), epoch=epoch, error=error))

    def decode_needed(self, name: str, refused_by: str, *, epoch: int = 1, retry_after_s: float = 0.5) -> None:
        needed = DecodeNeeded(
            request_id=RequestId("r"),
            epoch=epoch,
            refused_by=PeerId(peer(refused_by)),
            reason="full",
            retry_after_s=retry_after_s,
        )
        self.receive(peer(name), needed)

    def wait(self, seconds: float) -> None:
        """Let time pass; fire what is due, in order."""
        until = self.now + seconds
        while self.timers and min(self.timers.values()) <= until:
            key = min(self.timers, key=lambda key: self.timers[key])
            self.now = max(self.now, self.timers.pop(key))
            self.do(TimerFired(key))
        self.now = until

    # ------------------------------------------------------------ what happened

    def take_sent(self, kind: type[M]) -> list[tuple[str, M]]:
        """Return and forget the messages of one kind sent so far."""
        found = [(to, message) for to, message in self.sent if isinstance(message, kind)]
        self.sent = [(to, message) for to, message in self.sent if not isinstance(message, kind)]
        return found

    def dispatched(self) -> tuple[str, str | None, RequestSpec]:
        """Return and forget the one dispatch: entry node, decode node, request."""
        found = [(to, message) for to, message in self.sent if isinstance(message, (Prefill, Generate))]
        assert len(found) == 1, found
        self.sent.remove(found[0])
        to, message = found[0]
        if isinstance(message, Prefill):
            return to, message.decode_node.peer if message.decode_node else None, message.request
        return to, None, message.request

    def output(self, request_id: str = "r") -> list[int]:
        return [
            token_id
            for delivery in self.delivered[request_id]
            if isinstance(delivery, TokensDelivered)
            for token_id in delivery.token_ids
        ]

    def endings(self, request_id: str = "r") -> list[RequestEnded | RequestErrored]:
        return [item for item in self.delivered[request_id] if isinstance(item, (RequestEnded, RequestErrored))]

    def error_code(self, request_id: str = "r") -> str:
        (ending,) = self.endings(request_id)
        assert isinstance(ending, RequestErrored)
        return ending.error.code
