"""Who may say what to a node. Anybody can reach its port; only its router and its messager are obeyed as such."""

from __future__ import annotations

from kvrelay.core.ids import MESSAGER, ROUTER, PeerId
from kvrelay.core.messages import messager_to_node, router_to_node
from kvrelay.core.messages.base import Message

_SENDERS: dict[str, PeerId] = {router_to_node.__name__: ROUTER, messager_to_node.__name__: MESSAGER}


def may_send(peer: PeerId, message: Message) -> bool:
    """Return whether ``peer`` may send ``message`` to a node: not if it is for the router or the messager to say."""
    return _SENDERS.get(type(message).__module__, peer) == peer
