"""Encodes and decodes messages: MessagePack ``[tag, fields]``, checked against the types in ``messages``."""

from __future__ import annotations

from types import ModuleType

import msgpack
import msgspec

from kvrelay.errors import RemoteProtocolError
from kvrelay.protocol.messages import (
    base,
    decode_to_prefill,
    engine,
    messager_to_messager,
    messager_to_node,
    node_to_messager,
    node_to_router,
    prefill_to_decode,
    router_to_node,
    store_to_store,
)
from kvrelay.protocol.messages.base import Message

MAX_MESSAGE_BYTES = 16 << 20
"""Maximum size of a message. A prompt of a million tokens takes 5 MiB."""

_MAX_ITEMS = 2 << 20
_MAX_DEPTH_ITEMS = {"max_array_len": _MAX_ITEMS, "max_map_len": _MAX_ITEMS, "max_ext_len": 0}

_MODULES: tuple[ModuleType, ...] = (
    base,
    router_to_node,
    node_to_router,
    prefill_to_decode,
    decode_to_prefill,
    node_to_messager,
    messager_to_node,
    messager_to_messager,
    store_to_store,
    engine,
)

MESSAGES: dict[str, type[Message]] = {
    name: item
    for module in _MODULES
    for name, item in vars(module).items()
    if isinstance(item, type) and issubclass(item, Message) and item is not Message
}
"""Every message by its tag."""


_encoder = msgspec.msgpack.Encoder()
_decoders = {msgpack.packb([tag, None])[:-1]: msgspec.msgpack.Decoder(kind) for tag, kind in MESSAGES.items()}
"""By the bytes of a message before its fields: the array and the tag, a string of at most 31 bytes."""


def encode(message: Message) -> bytes:
    """Return ``message`` as bytes."""
    return _encoder.encode((type(message).__name__, message))


def decode(data: bytes | memoryview) -> Message:
    """Return the message in ``data``.

    Raises RemoteProtocolError with the reason: too long, not MessagePack, unknown tag, or invalid field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    message = _decode_valid(data)
    if message is not None:
        return message
    try:
        body = msgpack.unpackb(data, strict_map_key=False, **_MAX_DEPTH_ITEMS)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:  # TypeError: a map as a key
        raise RemoteProtocolError(f"not MessagePack: {error}") from error
    match body:
        case [str() as tag, dict() as fields] if tag in MESSAGES:
            try:
                return msgspec.convert(fields, MESSAGES[tag], builtin_types=(bytes,))
            except (msgspec.ValidationError, OverflowError) as error:
                raise RemoteProtocolError(f"{tag}: {error}") from error
        case [str() as tag, dict()]:
            raise RemoteProtocolError(f"unknown message {tag[:64]!r}")
    raise RemoteProtocolError("not a [tag, fields] pair")


def _decode_valid(data: bytes | memoryview) -> Message | None:
    """Return the message in ``data`` in one pass; None if it is not valid.

    What this refuses, ``decode`` refuses too, and says why.
    """
    size = 2 + (data[1] & 0x1F) if len(data) > 1 else 0
    decoder = _decoders.get(bytes(data[:size]))
    if decoder is None:
        return None
    try:
        return decoder.decode(data[size:])
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError):  # ValueError: text that is not UTF-8
        return None
