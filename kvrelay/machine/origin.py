"""Who may say what to a node. Anybody can reach its port; only its routers and its messager are obeyed as such."""

from __future__ import annotations

from kvrelay.machine.membership import Membership
from kvrelay.protocol.ids import MESSAGER, PeerId
from kvrelay.protocol.messages import messager_to_node
from kvrelay.protocol.messages.base import Message


def may_send(peer: PeerId, message: Message, membership: Membership) -> bool:
    """Return whether ``peer`` may send ``message`` to a node: not if it is for a router or the messager to say."""
    if type(message).__module__ == messager_to_node.__name__:
        return peer == MESSAGER
    return membership.is_authorized(peer, message)
