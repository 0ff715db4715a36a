"""Encodes the events that a machine takes, and the actions that it returns.

Nothing here is pickle: a file may come from anybody. An event is the name of its type and its fields, and only the
types of the role's own union can be read again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, get_args

import msgspec

from kvrelay.errors import KVRelayError, RemoteProtocolError, TransferError
from kvrelay.machine.contract import Received, Send
from kvrelay.protocol import codec
from kvrelay.protocol.codec import MESSAGES
from kvrelay.protocol.ids import PeerId
from kvrelay.protocol.messages.base import Message

_KINDS: list[type[TransferError]] = [TransferError, *TransferError.__subclasses__()]
_ERRORS = {kind.__name__: kind for kind in _KINDS}
"""The errors that events have."""


_MAX_TEXT = 400


class RecordedEvent(NamedTuple):
    """An event and the time at which it was handled."""

    now: float
    event: object


class EventCodec:
    """Codec of one role. ``events``: the union of its events. ``key``: the type of its timers' keys that are no text.

    KV that follows a message is not recorded, only its sizes: a machine does not look at it.
    """

    def __init__(self, events: object, key: type[tuple[Any, ...]] | None = None) -> None:
        self._kinds: dict[str, type] = {kind.__name__: kind for kind in get_args(events)}
        self._key = key
        self.encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
        """Encodes what ``fields_of`` returns."""

    def encode(self, event: Any, now: float) -> bytes:
        """Return ``event``, handled at ``now``, as MessagePack: ``[time, type, fields]``."""
        return self.encoder.encode((now, type(event).__name__, fields_of(event)))

    def encode_text(self, event: object, now: float) -> bytes:
        """Return an event that ``encode`` cannot encode, as a text for people that ``decode`` refuses."""
        return self.encoder.encode((now, type(event).__name__, ascii(event)[:_MAX_TEXT]))

    def decode(self, record: Any) -> RecordedEvent:
        """Return what ``encode`` was given, from its unpacked bytes.

        Raises RemoteProtocolError if it is not an event of this role.
        """
        try:
            now, name, fields = record
            event = self._received(fields) if name == "Received" else self._convert(fields, self._kinds[name])
            return RecordedEvent(float(now), event)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:  # msgspec's are ValueErrors
            raise RemoteProtocolError(f"not an event of this role: {error!r:.300}") from error

    def encode_actions(self, actions: Sequence[Any]) -> bytes:
        """Return ``actions`` as MessagePack: ``[type, fields]`` each. To be compared and shown, not to be decoded."""
        return self.encoder.encode([_named(action) for action in actions])

    def _received(self, fields: Any) -> Received:
        match fields:
            case [peer, bytes() as encoded, sizes]:
                message = codec.decode(encoded)
            case [peer, name, parts, sizes]:
                message = self._convert(parts, MESSAGES[name])
            case _:
                raise ValueError("neither the bytes of a message nor its type and fields")
        return Received(PeerId(peer), message, tuple(memoryview(bytes(size)) for size in sizes))

    def _convert(self, fields: Any, kind: type[Any]) -> Any:
        return msgspec.convert(fields, kind, builtin_types=(bytes,), dec_hook=self._unplain)

    def _unplain(self, kind: Any, value: Any) -> Any:
        if kind is range:
            return range(*value)
        if kind is TransferError:
            name, message = value
            return _ERRORS[name](message)
        if kind is Hashable:
            return self._key(*value) if self._key is not None and isinstance(value, list) else value
        raise NotImplementedError(kind)


def fields_of(event: Any) -> Any:
    """Return what a record has of ``event``. Of Received: peer, the message, and the sizes of the payload's parts.

    The message is the bytes that came, or if it came over no connection its type and fields.
    """
    if type(event) is not Received:
        return event
    sizes = [part.nbytes for part in event.payload] if event.payload else ()
    if event.encoded:
        return event.peer, event.encoded, sizes
    return event.peer, type(event.message).__name__, event.message, sizes


def kinds_of(actions: Sequence[Any]) -> list[type]:
    """Return the types of ``actions`` in order; instead of Send the type of the message."""
    return [type(action.message) if type(action) is Send else type(action) for action in actions]


def names_of(kinds: Sequence[type]) -> str:
    """Return ``kinds`` as a text: names of actions, or ``Send:`` and the name of the message."""
    return " ".join(f"Send:{kind.__name__}" if issubclass(kind, Message) else kind.__name__ for kind in kinds)


def _named(action: Any) -> tuple[Any, ...]:
    if type(action) is Send:
        return ("Send", action.peer, type(action.message).__name__, action.message)
    return (type(action).__name__, action)


def _plain(value: object) -> object:
    """Return ``value``, which MessagePack does not have, as something it has. The rest is for people: in log lines."""
    if isinstance(value, range):
        return (value.start, value.stop)
    if isinstance(value, KVRelayError):
        return (type(value).__name__, value.message)
    return repr(value)
