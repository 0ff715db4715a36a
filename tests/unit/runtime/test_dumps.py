"""A process writes its recording: because it crashes, or because it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.loops import run
from support.machines import node_config, registration, spec

from decode_node.machine import DecodeMachine
from kvrelay.cluster.replay import replay, show
from kvrelay.config.cluster_config import Role
from kvrelay.errors import ConfigError, LocalProtocolError
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import (
    DumpWritten,
    Exit,
    Machine,
    Received,
    RunStep,
    SetTimer,
    Started,
    TimerFired,
    WriteDump,
)
from kvrelay.node.recording import NODE_EVENTS, NodeStart
from kvrelay.protocol.ids import ROUTER, PeerId
from kvrelay.protocol.messages.router_to_node import Generate
from kvrelay.recording.settings import RecordingSettings
from kvrelay.runtime.dumps import Dumps
from kvrelay.runtime.shell import Shell
from kvrelay.runtime.transport import Transport


def dumps(directory: Path, **settings: Any) -> Dumps:
    node = node_config(Role.MIXED)
    start = NodeStart.of(node, registration(node), 1)
    return Dumps("m0", "mixed", start, NODE_EVENTS, RecordingSettings(directory=str(directory), **settings))


def drive(machine: Machine, recorded: Dumps, *events: object, handlers: dict[type, Any] | None = None) -> str:
    """Run ``machine`` on a shell that gets ``events``."""

    async def main() -> str:
        shell = Shell(machine, clock=Clock(), dumps=recorded, handlers=handlers)
        transport = Transport(PeerId("me#1"), shell.post)
        try:
            for event in events:
                shell.post(event)
            return await shell.run(transport)
        finally:
            transport.close()

    return run(main())


def replayed(path: Path) -> tuple[bool, list[str]]:
    said: list[str] = []
    return replay(path, said.append), said


CRASH = "LocalProtocolError: no timer is called 'lunch'"


def crash(directory: Path, **settings: Any) -> Path:
    """Have a mixed node's machine raise at its third event; return the only file there is then."""
    fresh = DecodeMachine(node_config(Role.MIXED), registration(node_config(Role.MIXED)), 1)
    events = (Received(ROUTER, Generate(request=spec(prompt=[70_001, 70_002]))), TimerFired("lunch"))
    with pytest.raises(LocalProtocolError, match="lunch"):
        drive(fresh, dumps(directory, **settings), *events, handlers={RunStep: id})
    (path,) = directory.rglob("*.kvrec")
    return path


def test_a_crash_is_written_and_its_replay_crashes_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = crash(tmp_path, prompts=True)
    assert str(path) in caplog.text
    same, said = replayed(path)
    assert (same, said) == (True, [f"m0: 3 events, the same actions, and the same crash: {CRASH}"])


def test_a_crash_that_does_not_come_again_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = crash(tmp_path, prompts=True)
    monkeypatch.setattr("kvrelay.node.machine.NodeMachine._timer_fired", lambda self, key: None)
    same, said = replayed(path)
    assert not same
    assert "m0: event 2 leads to something else" in said
    assert f"  - recorded: {CRASH}" in said


def test_the_file_of_a_crash_has_no_prompts_by_default_and_can_be_read(tmp_path: Path) -> None:
    path = crash(tmp_path)
    with pytest.raises(ConfigError, match="prompts were left out"):
        replay(path, print)
    said: list[str] = []
    show(path, said.append)
    assert len(said) == 5
    assert said[-1] == f"crash: {CRASH}"
    assert "Generate(" in said[2]
    assert "70001" not in "\n".join(said)


def test_a_crash_of_the_shell_is_written_too(tmp_path: Path) -> None:
    class Failing:
        def handle(self, event: object, now: float) -> list[object]:
            return [Exit()]

    def fail(_: object) -> None:
        raise OSError("no more sockets")

    with pytest.raises(OSError, match="no more sockets"):
        drive(Failing(), dumps(tmp_path), handlers={Exit: fail})
    (path,) = tmp_path.rglob("*.kvrec")
    said: list[str] = []
    show(path, said.append)
    assert said[1:] == [said[1], "crash: OSError: no more sockets"]
    assert said[1].endswith("Started() -> Exit")


def test_a_directory_that_cannot_be_written_hides_no_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("")

    class Broken:
        def handle(self, event: object, now: float) -> list[object]:
            raise LocalProtocolError("broken")

    with pytest.raises(LocalProtocolError, match="broken"):
        drive(Broken(), dumps(file / "below"))
    assert "recording not written" in caplog.text


class Asking:
    """Asks for a file at the start, and ends with the answer."""

    def __init__(self) -> None:
        self.answer: DumpWritten

    def handle(self, event: object, now: float) -> list[object]:
        if isinstance(event, DumpWritten):
            self.answer = event
            return [Exit()]
        return [WriteDump(ROUTER, "0a1b", with_prompts=True)]


@pytest.mark.parametrize(
    ("settings", "place", "error"),
    [
        ({}, lambda path: path, ""),
        ({"max_bytes": 0}, lambda path: path, "recording.max_bytes is 0: nothing is recorded"),
        ({}, lambda path: path / "file" / "below", "cannot write the recording: "),
    ],
    ids=["written", "off", "no directory"],
)
def test_who_asks_is_told_the_file_or_why_there_is_none(
    tmp_path: Path, settings: dict[str, Any], place: Callable[[Path], Path], error: str
) -> None:
    (tmp_path / "file").write_text("")
    machine = Asking()
    drive(machine, dumps(place(tmp_path), **settings))
    answer = machine.answer
    assert (answer.router, answer.dump_id, answer.process) == (ROUTER, "0a1b", "m0")
    assert answer.error.startswith(error) and bool(answer.error) is bool(error)
    assert bool(answer.path) is not bool(error)
    if answer.path:
        said: list[str] = []
        show(Path(answer.path), said.append)
        assert said[1].endswith(f"{Started()!r} -> WriteDump")


def test_who_asks_is_answered_whatever_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, only OSError was: an operator waited for a file that could not be made."""

    def fail(*_: object, **__: object) -> None:
        raise TypeError("70001")

    monkeypatch.setattr("kvrelay.runtime.dumps.write", fail)
    machine = Asking()
    drive(machine, dumps(tmp_path))
    assert machine.answer.error == "cannot write the recording: TypeError"


def test_a_crash_with_an_endless_text_that_is_none_is_written(tmp_path: Path) -> None:
    class Broken:
        def handle(self, event: object, now: float) -> list[object]:
            raise LocalProtocolError("\ud800" + "x" * 10_000)

    with pytest.raises(LocalProtocolError):
        drive(Broken(), dumps(tmp_path, prompts=True))
    (path,) = tmp_path.rglob("*.kvrec")
    said: list[str] = []
    show(path, said.append)
    assert said[-1].startswith(r"crash: LocalProtocolError: \ud800xxx")
    assert len(said[-1]) < 1100


def test_only_from_the_first_event_on_a_recording_can_be_replayed(tmp_path: Path) -> None:
    path = crash(tmp_path, prompts=True, max_bytes=300)
    with pytest.raises(ConfigError, match="the first 2 events of m0 are not in it"):
        replay(path, print)


def test_a_recording_has_no_secret_of_the_config() -> None:
    storage = {"backend": "redis", "url": "redis://user:hunter2@store:6379/1"}
    registry = {"kind": "redis", "url": "redis://user:hunter2@registry:6379/1"}
    node = node_config(Role.DECODE).model_validate(
        {"name": "d0", "role": "decode", "port": 1, "storage": storage, "registry": registry}
    )
    start = NodeStart.of(node, registration(node_config(Role.DECODE)), 1)
    assert b"hunter2" not in msgspec.json.encode(start)
    assert (start.node.storage.backend, start.node.registry.kind) == ("redis", "redis")
    assert start.node.scheduler == node.scheduler


def test_a_replay_does_not_claim_to_repeat_a_crash_of_the_shell(tmp_path: Path) -> None:
    fresh = DecodeMachine(node_config(Role.MIXED), registration(node_config(Role.MIXED)), 1)

    def fail(_: object) -> None:
        raise OSError("no more sockets")

    with pytest.raises(OSError, match="no more sockets"):
        drive(fresh, dumps(tmp_path, prompts=True), handlers={SetTimer: fail})
    (path,) = tmp_path.rglob("*.kvrec")
    same, (said,) = replayed(path)
    assert same
    assert "the same crash" not in said
    assert "a crash outside the machine, which a replay does not repeat: OSError: no more sockets" in said
