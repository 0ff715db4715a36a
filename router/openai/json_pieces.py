"""JSON in pieces: to copy a text of some megabytes takes the loop too long, however often that is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

PIECE_BYTES = 64 << 10
"""Pieces shorter than this are joined with their neighbours."""


class JsonPieces:
    """One JSON value, which may be long."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces


class JsonItems:
    """The items of a JSON list, without its brackets, encoded as they come."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._last = bytearray()

    def add(self, items: list[object]) -> None:
        """Add ``items``."""
        if items:
            self.add_encoded(memoryview(msgspec.json.encode(items))[1:-1])

    def add_encoded(self, items: bytes | memoryview) -> None:
        """Add ``items``, one or more, which are encoded, with commas between them."""
        if self._pieces or self._last:
            self._last += b","
        self._last += items
        if len(self._last) >= PIECE_BYTES:
            self._pieces.append(bytes(self._last))
            self._last.clear()

    @property
    def pieces(self) -> list[bytes]:
        """What was added."""
        return [*self._pieces, bytes(self._last)]


def object_pieces(body: Mapping[str, object]) -> list[bytes]:
    """Return ``body`` as JSON in pieces, with values of ``JsonPieces`` at its end."""
    long = {name: value for name, value in body.items() if isinstance(value, JsonPieces)}
    if not long:
        return [msgspec.json.encode(body)]
    head = msgspec.json.encode({name: value for name, value in body.items() if name not in long})[:-1]
    return list(_joined(_object(head, long)))


def filled(encoded: bytes, place: bytes, items: JsonItems) -> list[bytes]:
    """Return ``encoded`` in pieces, with the list of ``items`` wherever ``place`` is in it."""
    before, *behind = encoded.split(place)
    pieces = [before]
    for part in behind:
        pieces += [b"[", *items.pieces, b"]", part]
    return [piece for piece in _joined(pieces) if piece]


def _object(head: bytes, long: Mapping[str, JsonPieces]) -> Iterator[bytes]:
    """Yield ``head``, an object without its end, and the values behind it."""
    yield head
    for name, value in long.items():
        yield b',"%s":' % name.encode() if head != b"{" else b'"%s":' % name.encode()
        yield from value.pieces
        head = b""
    yield b"}"


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield ``pieces`` with short neighbours in one."""
    held: list[bytes] = []
    num_held = 0
    for piece in pieces:
        if num_held + len(piece) > PIECE_BYTES:
            yield b"".join(held)
            held, num_held = [], 0
        held.append(piece)
        num_held += len(piece)
    yield b"".join(held)
