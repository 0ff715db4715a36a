"""``kvrelay replay``: feeds the events of a recording to a new machine and compares what it does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

import kvrelay
from kvrelay.cluster.recorded_machine import codec_of, machine_of
from kvrelay.errors import ConfigError, KVRelayError, RemoteProtocolError
from kvrelay.machine.contract import Machine
from kvrelay.recording.event_codec import EventCodec, kinds_of, names_of
from kvrelay.recording.recording_file import Header, RawRecord, named, opened
from kvrelay.runtime.dumps import describe

_CONTEXT = 5
"""Events shown before a difference."""

_MAX_TEXT = 400
"""Characters of an event, or of an action, that are shown."""


class Difference(NamedTuple):
    """The first event that led to something else: what was ``recorded`` and what the ``replayed`` machine does."""

    number: int
    recorded: list[str]
    replayed: list[str]


def replay(path: Path, say: Callable[[str], None]) -> bool:
    """Replay a file; return whether the machine did the same as in the recording.

    ``say`` gets the lines for people. Raises ConfigError if the file cannot be replayed: damaged, or made without
    prompts, or without the first events.
    """
    try:
        with opened(path) as (header, records):
            _require_whole(header)
            if header.kvrelay != kvrelay.__version__:
                say(f"recorded by kvrelay {header.kvrelay}, this is {kvrelay.__version__}: it may differ for that")
            return _replay(header, records, say)
    except ConfigError:
        raise
    except KVRelayError as error:
        raise ConfigError([str(error)]) from error


def _require_whole(header: Header) -> None:
    if header.first > 0:
        raise ConfigError(
            [
                f"the first {header.first} events of {header.process} are not in it: it can be read (--show) but not"
                " replayed; a larger recording.max_bytes keeps more"
            ]
        )
    if not header.prompts:
        raise ConfigError(
            [
                "prompts were left out: it can be read (--show) but not replayed; kvrelay dump --with-prompts and"
                " recording.prompts write them"
            ]
        )


def _replay(header: Header, records: Iterator[RawRecord], say: Callable[[str], None]) -> bool:
    codec = codec_of(header.role)
    shown: deque[str] = deque(maxlen=_CONTEXT + 1)
    count, has_no_end = 0, False

    def read() -> Iterator[RawRecord]:
        nonlocal count, has_no_end
        for count, record in enumerate(records, 1):
            has_no_end = record.actions is None
            shown.append(_line(count - 1, record, codec))
            yield record

    difference = first_difference(machine_of(header.role, header.start), codec, read(), header.crash)
    if difference is None:
        which = "the same crash" if has_no_end else "a crash outside the machine, which a replay does not repeat"
        crash = f", and {which}: {header.crash}" if header.crash is not None else ""
        say(f"{header.process}: {count} events, the same actions{crash}")
        return True
    for line in shown:
        say(line)
    say(f"{header.process}: event {difference.number} leads to something else")
    for text in difference.recorded:
        say(f"  - recorded: {text}")
    for text in difference.replayed:
        say(f"  + replayed: {text}")
    return False


def first_difference(
    machine: Machine, codec: EventCodec, records: Iterable[RawRecord], crash: str | None = None
) -> Difference | None:
    """Feed ``records`` to ``machine``, which is new; return the first difference, or None.

    ``crash``: the exception that the recorded process ended with, if its machine or its shell raised one.
    Raises RemoteProtocolError if a record is not an event of this role.
    """
    for number, record in enumerate(records):
        now, event = codec.decode(record.event)
        try:
            actions = machine.handle(event, now)
        except Exception as error:
            raised = describe(error)
            if record.actions is None and raised == crash:
                continue
            return Difference(number, _texts(record.actions, crash), [raised])
        if record.actions is None:
            return Difference(number, [crash or "no end"], [names_of(kinds_of(actions))])
        if isinstance(record.actions, str):
            names = names_of(kinds_of(actions))
            if names != record.actions:
                return Difference(number, [record.actions], [names])
        else:
            again = msgpack.unpackb(codec.encode_actions(actions), strict_map_key=False)
            if msgpack.packb(again) != msgpack.packb(record.actions):  # as bytes, since NaN is not equal to itself
                return _in_full(number, record.actions, again)
    return None


def _in_full(number: int, recorded: list[Any], replayed: list[Any]) -> Difference:
    """Leave out what both have at the beginning and at the end."""
    start = 0
    while start < min(len(recorded), len(replayed)) and recorded[start] == replayed[start]:
        start += 1
    end = 0
    while end < min(len(recorded), len(replayed)) - start and recorded[-1 - end] == replayed[-1 - end]:
        end += 1
    parts = (actions[start : len(actions) - end] for actions in (recorded, replayed))
    first, second = ([_cut(repr(action)) for action in part] for part in parts)
    return Difference(number, first or ["nothing more"], second or ["nothing more"])


def show(path: Path, say: Callable[[str], None]) -> None:
    """Print the events of a file. Raises ConfigError if it is damaged."""
    try:
        with opened(path) as (header, records):
            codec = codec_of(header.role)
            say(f"{header.process}, a {header.role}, kvrelay {header.kvrelay}; prompts: {header.prompts}")
            for number, record in enumerate(records, header.first):
                say(_line(number, record, codec))
            if header.crash is not None:
                say(f"crash: {header.crash}")
    except KVRelayError as error:
        raise ConfigError([str(error)]) from error


def _line(number: int, record: RawRecord, codec: EventCodec) -> str:
    try:
        now, event = codec.decode(record.event)
        what = f"{now:.6f} {event!r}"
    except RemoteProtocolError:
        what = repr(record.event)
    return f"#{number} {_cut(what)} -> {' '.join(_texts(record.actions, None))}"


def _texts(actions: str | list[Any] | None, crash: str | None) -> list[str]:
    if actions is None:
        return [crash or "no end"]
    return [actions if isinstance(actions, str) else named(actions)]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
