"""Which messages are to be lost, delayed, repeated or damaged on purpose. Imports no transport: settings have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:  # a messager needs no pydantic
    from kvrelay.config.faults import FaultsConfig


class MessageFaults(msgspec.Struct, frozen=True):
    """The faults of messages in the section ``faults``: ``rates`` by message type and kind."""

    rates: Mapping[str, Mapping[str, float]]
    max_delay_s: float
    seed: int

    @classmethod
    def of(cls, config: FaultsConfig) -> MessageFaults | None:
        """Return the faults of messages in ``config``, or None if there are none."""
        rates = {message: {str(kind): rate for kind, rate in of.items()} for message, of in config.messages.items()}
        return cls(rates, config.max_delay_s, config.seed) if rates else None
