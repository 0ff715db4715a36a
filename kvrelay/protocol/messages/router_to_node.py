"""Router -> prefill, decode and mixed nodes."""

from __future__ import annotations

from kvrelay.protocol.messages.base import Message, NodeAddress
from kvrelay.protocol.request import RequestSpec


class Registered(Message, frozen=True, kw_only=True):
    """Router -> node, answers Register.

    The reader heartbeats from now on. A ``router_incarnation`` other than before means that the earlier router is gone
    with all its clients: the node ends every request it holds for it.
    """

    router_incarnation: str


class RegistrationRefused(Message, frozen=True, kw_only=True):
    """Router -> node, answers Register: it does not match the cluster.

    The reader logs ``reason`` and exits; trying again would change nothing.
    """

    reason: str


class RegisterAgain(Message, frozen=True, kw_only=True):
    """Router -> node whose heartbeat it cannot place: the router is new, or had given the node up.

    The reader sends Register.
    """


class Prefill(Message, frozen=True, kw_only=True):
    """Router -> P, a request arrived. ``decode_node`` is None if one token is all it wants.

    The reader computes the prompt, reserves blocks on the decode node and moves the KV there; it owes the router the
    first token, or RequestFailed.
    """

    request: RequestSpec
    decode_node: NodeAddress | None


class AssignDecode(Message, frozen=True, kw_only=True):
    """Router -> P, answers DecodeNeeded.

    The reader asks that node for a reservation; what it computed meanwhile stays.
    """

    request_id: str
    epoch: int
    decode_node: NodeAddress


class Generate(Message, frozen=True, kw_only=True):
    """Router -> mixed node, a request arrived; or D, if it is to compute the prompt itself or takes a preempted one.

    The reader serves the whole request; it owes the router all its tokens and one that finishes it, or RequestFailed.
    """

    request: RequestSpec


class Abort(Message, frozen=True, kw_only=True):
    """Router -> every node that serves the request: the client is gone, a stop string matched, or the partner failed.

    The reader stops work on it, releases its blocks and sends no more tokens of it, only its timeline. P also cancels
    its reservation on D. D does not tell P: the router sends an Abort to both.
    """

    request_id: str
    epoch: int


class Drain(Message, frozen=True, kw_only=True):
    """Router -> node, an operator wants it out.

    The reader finishes what it has; the router sends it nothing new.
    """
