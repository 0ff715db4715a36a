"""Files of recordings: who can read them, how many there are, what is left out, and what no recording is."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import stat
from itertools import product
from pathlib import Path
from typing import Any

import msgpack
import pytest
from support.machines import spec
from support.messages import EXAMPLES

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import KVRelayError
from kvrelay.machine.contract import Exit, PeerLost, Received, Started
from kvrelay.node.recording import NODE_EVENTS
from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.ids import ROUTER, PeerId, RequestId
from kvrelay.protocol.messages.base import Message
from kvrelay.protocol.messages.router_to_node import Abort, Generate
from kvrelay.recording.recorder import Recorder, Recording
from kvrelay.recording.recording_file import FORMAT, MAX_KEPT, SUFFIX, RawRecord, default_directory, opened, write
from kvrelay.recording.redaction import without_prompts
from kvrelay.recording.settings import RecordingSettings
from kvrelay.runtime.dumps import Dumps


def recording(*events: object, process: str = "m0", actions: bool = False) -> Recording:
    it = Recorder(process, "mixed", {"handle": b"\x00"}, NODE_EVENTS, RecordingSettings(actions=actions))
    handle = it.recorded(lambda event, now: [Exit("done")])
    for event in events:
        handle(event, 1.0)
    return it.recording()


def read(path: Path) -> list[RawRecord]:
    with opened(path) as (_, records):
        return list(records)


def test_only_this_user_can_read_the_file_and_its_directory(tmp_path: Path) -> None:
    path = write(recording(Started()), tmp_path / "new" / "recordings", prompts=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_header_and_records_come_back(tmp_path: Path) -> None:
    path = write(recording(Started()), tmp_path, prompts=True, crash="ValueError: x")
    with opened(path) as (header, records):
        assert (header.process, header.role, header.first, header.prompts) == ("m0", "mixed", 0, True)
        assert (header.start, header.crash) == ({"handle": b"\x00"}, "ValueError: x")
        assert list(records) == [RawRecord([1.0, "Started", {}], "Exit")]


def test_only_the_newest_files_of_a_process_are_kept(tmp_path: Path) -> None:
    other = write(recording(process="m0-a"), tmp_path, prompts=True)
    paths = []
    for number in range(MAX_KEPT + 3):
        paths.append(write(recording(), tmp_path, prompts=True))
        os.utime(paths[-1], ns=(number, number))
    assert set(tmp_path.iterdir()) == {*paths[-MAX_KEPT:], other}


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvrelay.recording.recording_file._redacted", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write(recording(Started()), tmp_path, prompts=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / f"m0-20261127T170000-00c0ffee{SUFFIX}"
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([gone]))
    assert write(recording(Started()), tmp_path, prompts=True).exists()


def test_tokens_are_left_out_unless_wanted(tmp_path: Path) -> None:
    message = Generate(request=spec(prompt=[70_001, 70_002]))
    for encoded, actions in product((b"", encode(message)), (False, True)):
        event = Received(ROUTER, message, (), encoded)
        whole = write(recording(event, actions=actions), tmp_path, prompts=True)
        public = write(recording(event, actions=actions), tmp_path, prompts=False)
        assert any("70001" in repr(NODE_EVENTS.decode(record.event)) for record in read(whole))
        assert "70001" not in repr(read(public))
        decoded = NODE_EVENTS.decode(read(public)[0].event).event
        assert isinstance(decoded, Received)
        assert isinstance(decoded.message, Generate)
        assert decoded.message.request.prompt_token_ids == [0, 0]
        assert read(public)[0].actions == "Exit"


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_bytes_of_every_message_are_redacted_in_a_file(message: Message, tmp_path: Path) -> None:
    event = Received(ROUTER, message, (), encode(message))
    path = write(recording(event), tmp_path, prompts=False)
    assert NODE_EVENTS.decode(read(path)[0].event).event == without_prompts(Received(ROUTER, message))
    if without_prompts(message) != message:
        assert encode(message) not in gzip.decompress(path.read_bytes())


def test_fields_that_a_later_version_adds_are_left_out_unless_prompts_are_wanted(tmp_path: Path) -> None:
    fields = {"request_id": "r", "epoch": 1, "later": ["secret", {b"\xff": msgpack.ExtType(7, b"")}]}
    encoded = msgpack.packb(["Abort", fields])
    message = decode(encoded)
    made = recording(Received(ROUTER, message, (), encoded))
    whole, public = (write(made, tmp_path, prompts=prompts) for prompts in (True, False))
    assert "secret" in repr(read(whole))
    assert "secret" not in repr(read(public))
    for path in (whole, public):
        assert NODE_EVENTS.decode(read(path)[0].event).event == Received(ROUTER, message)


def test_an_event_that_could_not_be_encoded_is_left_out_with_its_text(tmp_path: Path) -> None:
    event = Received(ROUTER, Abort(request_id=RequestId("secret\ud800"), epoch=1))
    assert "secret" in repr(read(write(recording(event), tmp_path, prompts=True)))
    assert read(write(recording(event), tmp_path, prompts=False)) == [RawRecord([1.0, "Received", ""], "Exit")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no recording"),
        (b"text", "Not a gzipped file"),
        (gzip.compress(b""), "no recording"),
        (gzip.compress(b"text"), "no recording"),
        (gzip.compress(pickle.dumps({"format": 1})), "no recording"),
        (gzip.compress(msgpack.packb({"format": FORMAT})), "missing required field"),
    ],
    ids=["empty", "text", "nothing", "compressed text", "pickle", "half a header"],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.kvrec"
    path.write_bytes(content)
    with pytest.raises(KVRelayError, match=problem):
        read(path)


def test_a_format_whose_header_is_another_is_named(tmp_path: Path) -> None:
    """Before, a file of format 1 was called no recording, since it has no ``kinds``."""
    path = write(recording(), tmp_path, prompts=True)
    header = msgpack.unpackb(gzip.decompress(path.read_bytes()))
    del header["kinds"]
    path.write_bytes(gzip.compress(msgpack.packb({**header, "format": 1})))
    with pytest.raises(KVRelayError, match=f"format 1, this version reads {FORMAT}"):
        read(path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = write(recording(), tmp_path, prompts=True)
    header = msgpack.unpackb(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(msgpack.packb({**header, "format": FORMAT + 1})))
    with pytest.raises(KVRelayError, match=f"format {FORMAT + 1}, this version reads {FORMAT}"):
        read(path)


def test_every_truncation_is_refused_where_it_ends(tmp_path: Path) -> None:
    events = [PeerLost(PeerId(f"p{number}#1"), "gone") for number in range(50)]
    path = write(recording(*events), tmp_path, prompts=True)
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(KVRelayError):
            read(path)


def test_a_file_that_is_missing_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(KVRelayError, match=r"x\.kvrec: No such file"):
        read(tmp_path / "x.kvrec")


@pytest.mark.parametrize(
    ("env", "directory"),
    [
        ({"XDG_STATE_HOME": "/var/state", "HOME": "/home/me"}, "/var/state/kvrelay/recordings"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.local/state/kvrelay/recordings"),
        ({"HOME": "/home/me"}, "/home/me/.local/state/kvrelay/recordings"),
    ],
)
def test_default_directory(env: dict[str, str], directory: str) -> None:
    assert default_directory(env) == Path(directory)


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"router": {"control": "tcp://127.0.0.1:8100"}}, "127.0.0.1-8100"),
        ({"router": {"control": "tcp://[::1]:8100"}}, "1-8100"),
        ({"registry": {"kind": "redis", "url": "redis://h", "cluster": "blue"}}, "blue"),
        ({"registry": {"kind": "redis", "url": "redis://h", "cluster": ".."}}, "cluster"),
    ],
)
def test_each_cluster_has_a_directory_of_its_own(sections: dict[str, Any], name: str, tmp_path: Path) -> None:
    node = {"name": "p0", "role": "mixed", "port": 1}
    data = {**sections, "recording": {"directory": str(tmp_path)}, "model": {"path": "x"}, "nodes": [node]}
    config = ClusterConfig.from_data(data)
    settings = RecordingSettings.of(config)
    assert settings == RecordingSettings.of(config.nodes[0])
    dumps = Dumps("p0", "mixed", {}, NODE_EVENTS, settings)
    dumps.write_crash(ValueError("x"))
    assert [path.parent for path in tmp_path.rglob(f"*{SUFFIX}")] == [tmp_path / name]
