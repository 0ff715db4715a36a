"""What a recording of a messager has, and how its machine is made again from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec

from cache_messager.machine import MessagerEvent, MessagerMachine
from cache_messager.settings import MessagerSettings
from kvrelay.protocol.kv_handle import KVMemoryHandle
from kvrelay.protocol.messages.base import LinkAddress
from kvrelay.protocol.messages.messager_to_messager import LinkOffer
from kvrelay.recording.event_codec import EventCodec

MESSAGER_EVENTS = EventCodec(MessagerEvent)


class MessagerStart(msgspec.Struct, frozen=True):
    """What a messager's machine was made from. ``settings``: without paths and handles, which no machine reads."""

    settings: MessagerSettings
    link: LinkAddress
    offers: list[LinkOffer]

    @classmethod
    def of(cls, settings: MessagerSettings, link: LinkAddress, offers: Sequence[LinkOffer]) -> Self:
        """Describe the machine with these arguments."""
        pool = KVMemoryHandle(pid=0, fd=0, tag="", num_blocks=settings.pool.num_blocks)
        public = msgspec.structs.replace(settings, pool=pool, node_address="", runtime_dir="", keys=None)
        return cls(public, link, list(offers))

    def machine(self) -> MessagerMachine:
        """Return a new machine of that kind."""
        return MessagerMachine(self.settings, self.link, self.offers)
