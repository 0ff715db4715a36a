"""Files of recordings: MessagePack, compressed with gzip. A header, then ``[event, actions]`` for each event."""

from __future__ import annotations

import gzip
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import msgspec

import kvrelay
from kvrelay.errors import KVRelayError, RemoteProtocolError
from kvrelay.recording.event_codec import names_of
from kvrelay.recording.recorder import Record, Recording
from kvrelay.recording.redaction import without_prompts

SUFFIX = ".kvrec"
FORMAT = 1

MAX_KEPT = 8
"""Files kept of each process: one that crashes again and again must not fill the disk."""

_MAX_RECORD_BYTES = 256 << 20
_LEVEL = 1
"""Of compression: a process that serves has little time."""

_NONE = b"\xc0"
_PAIR = b"\x92"
"""MessagePack: nothing, and the beginning of a list of two."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a file. ``first``: number of the first event in it, from 0; only with 0 it can be replayed.

    ``start``: what the machine was made from. ``prompts``: tokens are in it, and it can be replayed.
    ``crash``: the exception for which it was written.
    """

    format: int
    kvrelay: str
    python: str
    process: str
    role: str
    written_s: float
    first: int
    prompts: bool
    start: Any
    crash: str | None = None


class RawRecord(NamedTuple):
    """An event as ``EventCodec.decode`` takes it, and the types of its actions, the actions, or None."""

    event: Any
    actions: str | list[Any] | None


def default_directory(env: Mapping[str, str] = os.environ) -> Path:
    """Return where files go unless the config says otherwise."""
    state = Path(env.get("XDG_STATE_HOME", ""))
    base = state if state.is_absolute() else Path(env.get("HOME", "/")) / ".local" / "state"
    return base / "kvrelay" / "recordings"


def write(recording: Recording, directory: Path, *, prompts: bool, crash: str | None = None) -> Path:
    """Write ``recording`` to a new file in ``directory`` that only this user can read; return its path.

    The oldest files of the same process are removed. Raises OSError if it cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    path = directory / f"{recording.process}-{stamp}-{secrets.token_hex(4)}{SUFFIX}"
    header = Header(
        format=FORMAT,
        kvrelay=kvrelay.__version__,
        python=platform.python_version(),
        process=recording.process,
        role=recording.role,
        written_s=time.time(),
        first=recording.first,
        prompts=prompts,
        start=recording.start,
        crash=crash,
    )
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_LEVEL) as packed,
        ):
            packed.write(msgspec.msgpack.encode(header))
            for record in recording.records:
                packed.write(_packed(record if prompts else _redacted(record, recording)))
    except BaseException:  # half a file can be read by nobody, and is not counted below
        path.unlink(missing_ok=True)
        raise
    _remove_oldest(directory, recording.process)
    return path


@contextmanager
def opened(path: Path) -> Iterator[tuple[Header, Iterator[RawRecord]]]:
    """Return a context with the header and the records of a file.

    Raises KVRelayError if it is no recording, here or while the records are read.
    """
    with _unzipping(path) as file:
        unpacker = msgpack.Unpacker(file, strict_map_key=False, max_buffer_size=_MAX_RECORD_BYTES)
        objects = _objects(unpacker, path)
        header = _header(next(objects, None), path)
        yield header, (_record(item, path) for item in objects)


def _unzipping(path: Path) -> gzip.GzipFile:
    try:
        return gzip.GzipFile(path, "rb")
    except OSError as error:
        raise KVRelayError(f"{path}: {error.strerror or error}") from error


def _packed(record: Record) -> bytes:
    event, actions = record
    if isinstance(actions, tuple):
        actions = msgspec.msgpack.encode(names_of(actions))
    return _PAIR + event + (_NONE if actions is None else actions)


def _redacted(record: Record, recording: Recording) -> Record:
    """Return ``record`` without tokens. Of the actions only the types are left."""
    encoded, actions = record
    if isinstance(actions, bytes):
        names = named(msgpack.unpackb(actions, strict_map_key=False))
        actions = msgspec.msgpack.encode(names)
    unpacked = msgpack.unpackb(encoded, strict_map_key=False)
    try:
        now, event = recording.codec.decode(unpacked)
    except RemoteProtocolError:  # it could not be encoded, and is a text
        now, kind, _ = unpacked
        return msgspec.msgpack.encode((now, kind, "")), actions
    return recording.codec.encode(without_prompts(event), now), actions


def named(actions: list[Any]) -> str:
    """Return the types of encoded actions, as ``names_of`` does."""
    return " ".join(f"Send:{item[2]}" if item[0] == "Send" else item[0] for item in actions)


def _remove_oldest(directory: Path, process: str) -> None:
    name = re.compile(rf"{re.escape(process)}-\d{{8}}T\d{{6}}-[0-9a-f]+{re.escape(SUFFIX)}")
    ages = [_written_ns(path) for path in directory.iterdir() if name.fullmatch(path.name)]
    files = sorted(age for age in ages if age is not None)
    for _, path in files[:-MAX_KEPT]:
        path.unlink(missing_ok=True)


def _written_ns(path: Path) -> tuple[int, Path] | None:
    """Return when a file was written, with its path; None if it is gone: another process removes files, too."""
    try:
        return path.lstat().st_mtime_ns, path
    except FileNotFoundError:
        return None


def _objects(unpacker: msgpack.Unpacker, path: Path) -> Iterator[Any]:
    try:
        yield from unpacker
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, msgpack.UnpackException) as error:
        raise KVRelayError(f"{path}: no recording, or damaged: {error or type(error).__name__}") from error
    except OSError as error:
        raise KVRelayError(f"{path}: {error.strerror or error}") from error


def _header(value: Any, path: Path) -> Header:
    try:
        header = msgspec.convert(value, Header, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise KVRelayError(f"{path}: no recording: {error}") from error
    if header.format != FORMAT:
        raise KVRelayError(f"{path}: format {header.format}, this version reads {FORMAT}")
    return header


def _record(value: Any, path: Path) -> RawRecord:
    match value:
        case [event, (str() | list() | None) as actions]:
            return RawRecord(event, actions)
    raise KVRelayError(f"{path}: damaged: not a record")
