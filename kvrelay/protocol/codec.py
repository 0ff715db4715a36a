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


_STEP_HEAD = msgpack.packb([node_to_router.TokensOut.__name__, None])[:-1]
_step_decoder = msgspec.msgpack.Decoder(node_to_router.TokensOut)


def encode(message: Message) -> bytes:
    """Return ``message`` as bytes."""
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    packed: bytes = msgpack.packb([type(message).__name__, fields])
    return packed


def decode(data: bytes | memoryview) -> Message:
    """Return the message in ``data``.

    Raises RemoteProtocolError with the reason: too long, not MessagePack, unknown tag, or invalid field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    step = _decode_step(data)
    if step is not None:
        return step
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


def _decode_step(data: bytes | memoryview) -> Message | None:
    """Return TokensOut, which has every token that the router sends on, in a third of the time; None if it is not one.

    What this decoder refuses, ``decode`` refuses too, and says why.
    """
    size = len(_STEP_HEAD)
    if data[:size] != _STEP_HEAD:
        return None
    try:
        return _step_decoder.decode(data[size:])
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError):  # ValueError: text that is not UTF-8
        return None
