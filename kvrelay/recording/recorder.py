"""The recording of one process: its last events, encoded, within a bound of bytes.

What is kept is bytes in a row, and no object for each event: objects that live on, and memory here and there, cost a
machine more than the encoding does (docs/adr/0022). No request's memory is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from kvrelay.machine.contract import Received, Send
from kvrelay.recording.event_codec import EventCodec, fields_of, names_of
from kvrelay.recording.settings import RecordingSettings

_MAX_SEGMENT_BYTES = 1 << 16
_MIN_SEGMENTS = 16

_UNENCODABLE = (ValueError, OverflowError)
"""Raised for a text with half a surrogate pair, and for numbers beyond 64 bits. The machine decides what they mean."""

Handle: TypeAlias = Callable[[Any, float], Sequence[object]]
"""The method of a machine."""


class _Segment(NamedTuple):
    """Events in a row, encoded."""

    num_events: int
    data: bytes


class _Numbers(dict[type, int]):
    """Numbers of types, in the order in which they are asked for."""

    def __missing__(self, kind: type) -> int:
        number = self[kind] = len(self)
        return number


class Recording(NamedTuple):
    """What a process remembers at one moment. ``first``: how many earlier events it has forgotten.

    ``start``: what the role's machine was made from, as built-in types. ``segments``: MessagePack, for each event
    ``[time, type, fields]`` and then its actions: numbers of names in ``kinds``, or type and fields of each. An event
    that is still handled, or broke the machine, is the last and has none.
    """

    process: str
    role: str
    start: Any
    codec: EventCodec
    first: int
    kinds: Sequence[str]
    segments: Sequence[bytes]


class Recorder:
    """Records what one machine handles.

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
        self._numbers = _Numbers({Send: 0})
        self._segments: deque[_Segment] = deque()
        self._size = 0
        self._num_forgotten = 0
        self._newest = bytearray()
        """Events that are in no segment yet."""
        self._num_newest = 0
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, self._settings.max_bytes // _MIN_SEGMENTS)

    def recorded(self, handle: Handle) -> Handle:
        """Return ``handle``, the method of the machine, with a record of each call.

        A machine that has raised an exception gets no other event.
        """
        newest, segment_bytes, numbers = self._newest, self._segment_bytes, self._numbers
        encode_into, in_full = self._codec.encoder.encode_into, self._settings.actions

        def handle_and_record(event: Any, now: float) -> Sequence[object]:
            kind, start = type(event), len(newest)
            try:
                encode_into((now, kind.__name__, fields_of(event) if kind is Received else event), newest, start)
            except _UNENCODABLE:
                newest[start:] = self._codec.encode_text(event, now)
            actions: Sequence[Any] = handle(event, now)
            kinds = [numbers[type(action)] or numbers[type(action.message)] for action in actions]  # 0 is Send
            if in_full:
                newest.extend(self._in_full(actions, kinds))
            else:
                encode_into(kinds, newest, -1)
            self._num_newest += 1
            if len(newest) >= segment_bytes:
                self._close_segment()
            return actions

        return handle_and_record

    def _in_full(self, actions: Sequence[object], kinds: list[int]) -> bytes:
        try:
            return self._codec.encode_actions(actions)
        except _UNENCODABLE:
            return msgspec.msgpack.encode(kinds)

    def _close_segment(self) -> None:
        segment = _Segment(self._num_newest, bytes(self._newest))
        self._newest.clear()
        self._num_newest = 0
        self._segments.append(segment)
        self._size += len(segment.data)
        while self._size > self._settings.max_bytes - self._segment_bytes:
            oldest = self._segments.popleft()
            self._size -= len(oldest.data)
            self._num_forgotten += oldest.num_events

    def recording(self) -> Recording:
        """Return what is remembered now."""
        segments = [*(segment.data for segment in self._segments), bytes(self._newest)]
        kinds = [names_of([kind]) for kind in self._numbers]
        return Recording(self._process, self._role, self._start, self._codec, self._num_forgotten, kinds, segments)
