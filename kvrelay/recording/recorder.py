"""The recording of one process: its last events, encoded at once, within a bound of bytes.

References to the events would be cheaper to take and dearer to keep: the thousands of objects that then live longer
cost a decode node 20 % of its machine's time, the bytes less than half of that (docs/adr/0022). What a machine does
with an event after it was recorded changes nothing here, and no request's memory is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from kvrelay.recording.event_codec import EventCodec, kinds_of
from kvrelay.recording.settings import RecordingSettings

_RECORD_BYTES = 200
"""What a record takes beside its bytes, about."""

_KIND_BYTES = 8

_UNENCODABLE = (ValueError, OverflowError)
"""Raised for a text with half a surrogate pair, and for numbers beyond 64 bits. The machine decides what they mean."""


Record: TypeAlias = tuple[bytes, tuple[type, ...] | bytes | None]
"""One event, encoded, and what it led to: the types of the actions, or the actions, encoded; None: it is not over."""


class Recording(NamedTuple):
    """What a process remembers at one moment. ``first``: how many earlier events it has forgotten.

    ``start``: what the role's machine was made from, as built-in types.
    """

    process: str
    role: str
    start: Any
    codec: EventCodec
    first: int
    records: Sequence[Record]


class Recorder:
    """Records what one machine handles: ``begin`` before each event and ``end`` after it.

    ``process``: its name, for the file. ``start``: what the role's machine was made from.
    """

    def __init__(
        self, process: str, role: str, start: object, codec: EventCodec, settings: RecordingSettings | None = None
    ) -> None:
        self._settings = settings or RecordingSettings()
        self._process = process
        self._role = role
        self._start = msgspec.to_builtins(start, builtin_types=(bytes,))
        self._codec = codec
        self._records: deque[Record] = deque()
        self._size = 0
        self._num_forgotten = 0
        self._begun: bytes | None = None

    def begin(self, event: object, now: float) -> None:
        """Record that ``event`` is handled at time ``now``."""
        try:
            self._begun = self._codec.encode(event, now)
        except _UNENCODABLE:
            self._begun = self._codec.encode_unreadable(event, now)

    def end(self, actions: Sequence[object]) -> None:
        """Record what the event led to."""
        event, self._begun = self._begun, None
        if event is None:
            return
        record: Record = (event, self._encoded(actions) if self._settings.actions else kinds_of(actions))
        self._records.append(record)
        self._size += _size(record)
        while self._size > self._settings.max_bytes:
            self._size -= _size(self._records.popleft())
            self._num_forgotten += 1

    def _encoded(self, actions: Sequence[object]) -> tuple[type, ...] | bytes:
        try:
            return self._codec.encode_actions(actions)
        except _UNENCODABLE:
            return kinds_of(actions)

    def recording(self) -> Recording:
        """Return what is remembered now. An event that is still handled, or broke the machine, is its last record."""
        records = list(self._records)
        if self._begun is not None:
            records.append((self._begun, None))
        return Recording(self._process, self._role, self._start, self._codec, self._num_forgotten, records)


def _size(record: Record) -> int:
    event, led_to = record
    if type(led_to) is bytes:
        return _RECORD_BYTES + len(event) + len(led_to)
    return _RECORD_BYTES + len(event) + _KIND_BYTES * len(led_to or ())
