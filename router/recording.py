"""What a recording of the router has, and what its machine is made from."""

from __future__ import annotations

from kvrelay.recording.event_codec import EventCodec
from router.machine import RouterEvent
from router.request import RequestTimer

ROUTER_EVENTS = EventCodec(RouterEvent, RequestTimer)
