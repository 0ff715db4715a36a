"""Files of recordings: MessagePack, compressed with gzip. A header, then each event and its actions."""

from __future__ import annotations

import gzip
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import msgspec

import kvrelay
from kvrelay.errors import KVRelayError, RemoteProtocolError
from kvrelay.recording.recorder import Recording
from kvrelay.recording.redaction import without_prompts

SUFFIX = ".kvrec"
FORMAT = 2

MAX_KEPT = 8
"""Files kept of each process: one that crashes again and again must not fill the disk."""

_MAX_RECORD_BYTES = 256 << 20
_LEVEL = 1
"""Of compression: a process that serves has little time."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a file. ``first``: number of the first event in it, from 0; only with 0 it can be replayed.

    ``start``: what the machine was made from. ``prompts``: tokens are in it, and it can be replayed.
    ``crash``: the exception for which it was written. ``kinds``: names of the types of actions, by their numbers.
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
    kinds: Sequence[str]
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
        kinds=recording.kinds,
        crash=crash,
    )
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_LEVEL) as packed,
        ):
            packed.write(msgspec.msgpack.encode(header))
            for segment in recording.segments:
                packed.writelines([segment] if prompts else _redacted(segment, recording))
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
        yield header, (_record(*pair, header.kinds, path) for pair in zip_longest(objects, objects))


def _unzipping(path: Path) -> gzip.GzipFile:
    try:
        return gzip.GzipFile(path, "rb")
    except OSError as error:
        raise KVRelayError(f"{path}: {error.strerror or error}") from error


def _redacted(segment: bytes, recording: Recording) -> Iterator[bytes]:
    """Yield the records in ``segment`` without tokens. Of the actions only the types are left."""
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=len(segment))
    unpacker.feed(segment)
    for event, actions in zip_longest(unpacker, unpacker):
        try:
            now, decoded = recording.codec.decode(event)
        except RemoteProtocolError:  # it could not be encoded, and is a text
            now, kind, _ = event
            yield msgspec.msgpack.encode((now, kind, ""))
        else:
            yield recording.codec.encode(without_prompts(decoded), now)
        if actions is not None:
            yield msgspec.msgpack.encode(named(actions, recording.kinds))


def named(actions: list[Any], kinds: Sequence[str] = ()) -> str:
    """Return the types of encoded actions, as ``names_of`` does. ``kinds``: names of those that are only numbers.

    Raises IndexError if there is no such number.
    """
    return " ".join(kinds[item] if isinstance(item, int) else _name(item) for item in actions)


def _name(action: list[Any]) -> str:
    return f"Send:{action[2]}" if action[0] == "Send" else action[0]


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
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(found, int) and found != FORMAT:  # first: its header may have other fields
        raise KVRelayError(f"{path}: format {found}, this version reads {FORMAT}")
    try:
        return msgspec.convert(value, Header, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise KVRelayError(f"{path}: no recording: {error}") from error


def _record(event: Any, actions: Any, kinds: Sequence[str], path: Path) -> RawRecord:
    try:
        if isinstance(actions, list) and all(isinstance(action, int) for action in actions):
            actions = named(actions, kinds)
    except IndexError as error:
        raise KVRelayError(f"{path}: damaged: an action without a name") from error
    if isinstance(actions, str | list | None):
        return RawRecord(event, actions)
    raise KVRelayError(f"{path}: damaged: not a record")
