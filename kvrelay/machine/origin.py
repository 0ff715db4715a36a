"""Which messages a node takes from which peer. Any process can reach its port."""

from __future__ import annotations

from kvrelay.machine.membership import Membership
from kvrelay.protocol.ids import MESSAGER, PeerId
from kvrelay.protocol.messages import messager_to_node
from kvrelay.protocol.messages.base import Message


def may_send(peer: PeerId, message: Message, membership: Membership) -> bool:
    """Return False if ``message`` is one that only routers or the node's messager send, and ``peer`` is neither."""
    if type(message).__module__ == messager_to_node.__name__:
        return peer == MESSAGER
    return membership.is_authorized(peer, message)
