"""The ``kvrelay`` command from the outside: exit codes, what it says, what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvrelay import __version__ as version
from kvrelay.cluster.cli import main
from kvrelay.machine.contract import Started, StopRequested
from kvrelay.protocol.ids import ROUTER
from kvrelay.recording.recorder import Recorder
from kvrelay.recording.recording_file import write
from router.machine import RouterMachine, RouterSettings
from router.recording import ROUTER_EVENTS

CONFIGS = Path(__file__).parents[2] / "configs"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def kvrelay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvrelay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *capsys.readouterr())

    return run


def test_config_check_counts_the_nodes(kvrelay: Command) -> None:
    assert kvrelay("config", "check", CONFIGS / "1p3d.yaml") == (
        0,
        f"{CONFIGS}/1p3d.yaml: OK: 3 decode, 1 prefill\n",
        "",
    )


def test_config_check_lists_every_problem_and_exits_2(kvrelay: Command, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("cahce: {}\nnodes:\n  - {name: m0, role: mixed, port: 0}\n")

    code, _, err = kvrelay("config", "check", path, "--set", "router.port=x")

    assert code == 2
    assert err.splitlines() == [
        "--set router.port=x: router.port: should be a valid integer, not 'x'",
        f"{path}:1: cahce: unknown key; did you mean cache?",
        f"{path}:3: nodes.m0.port: should be greater than or equal to 1, not 0",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["up"],
        ["up", "missing.yaml"],
        ["router", "missing.yaml"],
        ["prefill", CONFIGS / "1p1d.yaml"],
        ["prefill", CONFIGS / "1p1d.yaml", "--node", "nobody"],
        ["prefill", CONFIGS / "1p1d.yaml", "--node", "d0"],
        ["decode", CONFIGS / "1p1d.yaml", "--node", "p0"],
        ["mixed", CONFIGS / "1p1d.yaml", "--node", "p0"],
        ["up", CONFIGS / "1p1d.yaml", "--set", "model.path=/nonexistent"],
        ["chat", "--max-tokens", "0", "hello"],
        ["model", "tiny", "somewhere", "--arch", "gpt2"],
        ["model", "tiny", "somewhere", "--preset", "huge"],
        ["config", "check"],
        ["status", "ftp://127.0.0.1:8000"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)).replace(str(CONFIGS), "configs"),
)
def test_bad_usage_and_bad_configs_exit_2(kvrelay: Command, arguments: list[object]) -> None:
    code, _, err = kvrelay(*arguments)

    assert code == 2
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["status", "chat"])
def test_no_cluster_there_exits_1(kvrelay: Command, verb: str) -> None:
    words = ["hello"] if verb == "chat" else []

    code, _, err = kvrelay(verb, "http://127.0.0.1:9", *words)

    assert code == 1
    assert err.startswith("error: no answer from http://127.0.0.1:9 (")
    assert "kvrelay up CONFIG" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9", "localhost:9/v1", "http://127.0.0.1:9/v1/", "[::1]:9"])
def test_an_address_may_be_written_as_people_write_it(kvrelay: Command, address: str) -> None:
    url = f"http://{address.removeprefix('http://')}".rstrip("/").removesuffix("/v1")

    for arguments in (["status", address], ["chat", address, "hello"]):
        code, _, err = kvrelay(*arguments)
        assert code == 1
        assert err.startswith(f"error: no answer from {url} (")


def test_the_schema_is_json_with_every_section(kvrelay: Command) -> None:
    schema = json.loads(kvrelay("config", "schema").out)

    assert {"model", "router", "cache", "scheduler", "transfer", "storage", "nodes"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


def test_every_verb_of_the_design_is_there(kvrelay: Command) -> None:
    out = kvrelay("--help").out

    for verb in ("up", "router", "prefill", "decode", "mixed", "status", "chat", "config", "model", "store"):
        assert f" {verb} " in out


def test_the_version(kvrelay: Command) -> None:
    assert kvrelay("--version") == (0, f"kvrelay {version}\n", "")


def test_the_command_starts_without_what_only_roles_need() -> None:
    script = "import sys, kvrelay.cluster.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()

    assert not {"paddle", "numpy", "zmq", "starlette", "httpx", "tokenizers"} & set(loaded)


def test_replay_tells_by_its_exit_code_what_came_of_it(kvrelay: Command, tmp_path: Path) -> None:
    settings = RouterSettings("demo", "r1")
    recorder = Recorder("router", ROUTER, settings, ROUTER_EVENTS)
    machine = RouterMachine(settings)
    recorder.recorded(machine.handle)(Started(), 1.0)
    same = write(recorder.recording(), tmp_path, prompts=True)
    assert kvrelay("replay", same) == (0, "router: 1 events, the same actions\n", "")
    recorder.recorded(lambda event, now: [])(StopRequested(), 2.0)
    other = write(recorder.recording(), tmp_path, prompts=True)
    code, out, _ = kvrelay("replay", other)
    assert code == 1
    assert "router: event 1 leads to something else\n  - recorded: \n  + replayed: FinishClients" in out
    public = write(recorder.recording(), tmp_path, prompts=False)
    code, _, err = kvrelay("replay", public)
    assert (code, "prompts were left out" in err) == (2, True)
    code, out, _ = kvrelay("replay", public, "--show")
    assert (code, out.count("\n#")) == (0, 2)
    assert kvrelay("replay", tmp_path / "none") == (2, "", f"{tmp_path}/none: No such file or directory\n")


def test_what_is_in_a_recording_is_no_command_for_the_terminal(kvrelay: Command, tmp_path: Path) -> None:
    settings = RouterSettings("demo", "r1")
    recorder = Recorder("router", ROUTER, settings, ROUTER_EVENTS)
    recorder.recorded(RouterMachine(settings).handle)(Started(), 1.0)
    crash = write(recorder.recording(), tmp_path, prompts=True, crash="ValueError: [bold]\x1b[31mred\nline")
    for option in ((), ("--show",)):
        assert r"ValueError: [bold]\x1b[31mred\nline" in kvrelay("replay", crash, *option).out
