"""Makes the machine of a recording again. Any role may be recorded, so this knows all of them."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from cache_messager.recording import MESSAGER_EVENTS, MessagerStart
from decode_node.machine import DecodeMachine
from kvrelay.config.cluster_config import Role
from kvrelay.errors import KVRelayError
from kvrelay.machine.contract import Machine
from kvrelay.node.recording import NODE_EVENTS, NodeStart
from kvrelay.protocol.ids import MESSAGER, ROUTER
from kvrelay.recording.event_codec import EventCodec
from prefill_node.machine import PrefillMachine
from router.machine import RouterMachine, RouterSettings
from router.recording import ROUTER_EVENTS

T = TypeVar("T")


def codec_of(role: str) -> EventCodec:
    """Return the codec of a role's events. Raises KVRelayError if there is no such role."""
    if role == ROUTER:
        return ROUTER_EVENTS
    if role == MESSAGER:
        return MESSAGER_EVENTS
    if role in list(Role):
        return NODE_EVENTS
    raise KVRelayError(f"there is no role {role!r}")


def machine_of(role: str, start: Any) -> Machine:
    """Return a new machine of ``role``. Raises KVRelayError if ``start`` is not what such a machine is made from."""
    try:
        if role == ROUTER:
            return RouterMachine(_converted(start, RouterSettings))
        if role == MESSAGER:
            return _converted(start, MessagerStart).machine()
        node = _converted(start, NodeStart)
        kind = PrefillMachine if role == Role.PREFILL else DecodeMachine
        return kind(node.node, node.registration, node.max_plans_in_flight)
    except ValueError as error:  # msgspec's and pydantic's errors are
        raise KVRelayError(f"its machine cannot be made: {error}") from error


def _converted(start: Any, kind: type[T]) -> T:
    return msgspec.convert(start, kind, builtin_types=(bytes,))
