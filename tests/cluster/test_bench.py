"""``kvrelay bench`` against a cluster of real processes, and servers that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.cluster import Cluster

from kvrelay.cluster.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Bench = Callable[..., Outcome]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["kvrelay", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *capsys.readouterr())

    return run


def test_a_random_load_is_measured_with_its_phases(fake_cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    load = ("--num-prompts", 12, "--input-len", 60, "--output-len", 9, "--range-ratio", 0.5, "--ignore-eos")
    found = bench(
        fake_cluster.url, "tpot:60000", *load, "--request-rate", 50, "--goodput", "ttft:60000", "--json", result
    )

    assert found.code == 0, found
    assert "TTFT" in found.out
    assert "transfer" in found.out
    data = json.loads(result.read_text())
    assert data["request_rate"] == 50
    [server] = data["servers"]
    [measured] = server["rounds"]
    assert (measured["completed"], measured["failed"], measured["slo_attainment"]) == (12, 0, 1.0)
    assert measured["total_input_tokens"] == sum(measured["input_lens"])
    assert all(30 <= length <= 90 for length in measured["input_lens"])
    assert all(4 <= length <= 14 for length in measured["output_lens"])  # asked for, and counted by the server
    assert measured["phases"]["num_timelines"] == 12
    assert {"mean_prefill_ms", "mean_transfer_ms", "mean_decode_ms", "hidden_share"} <= measured["phases"].keys()


def test_chats_and_traces_are_served(fake_cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    result, trace = tmp_path / "result.json", tmp_path / "trace.jsonl"
    entries = [{"timestamp": 10 * n, "input_length": 600, "output_length": 5, "hash_ids": [1, n]} for n in range(4)]
    trace.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    chats = ("--load", "chats", "--num-prompts", 3, "--turns", 2, "--input-len", 20, "--output-len", 4)
    assert bench(fake_cluster.url, *chats, "--max-concurrency", 2, "--json", result).code == 0
    assert _rounds(result)[0]["completed"] == 6

    replay = ("--load", "mooncake", "--file", trace, "--length-scale", 0.2)
    assert bench(fake_cluster.url + "/v1", *replay, "--json", result).code == 0
    assert _rounds(result)[0]["input_lens"] == [120] * 4


def test_two_servers_are_compared_in_rounds(fake_cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    load = ("--num-prompts", 4, "--input-len", 20, "--output-len", 4, "--ignore-eos", "--rounds", 2)
    found = bench(fake_cluster.url, "--compare", fake_cluster.url, *load, "--json", result)

    assert found.code == 0, found
    assert "95 % interval" in found.out
    data = json.loads(result.read_text())
    assert [len(server["rounds"]) for server in data["servers"]] == [2, 2]
    assert data["ratios"]["mean_ttft_ms"]["mean"] > 0


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (kvrelay[bench]) is not installed")
def test_a_picture_is_a_png(fake_cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    load = ("--num-prompts", 4, "--input-len", 20, "--output-len", 4, "--ignore-eos")

    assert bench(fake_cluster.url, *load, "--plot", path).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_before_anything_is_sent(
    fake_cluster: Cluster, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    submitted = fake_cluster.status()["requests"]["submitted"]
    found = bench(fake_cluster.url, "--plot", tmp_path / "picture.png")

    assert (found.code, found.err) == (1, "error: --plot needs matplotlib: pip install 'kvrelay[bench]'\n")
    assert fake_cluster.status()["requests"]["submitted"] == submitted


def test_requests_that_fail_are_shown_and_the_exit_code_is_1(fake_cluster: Cluster, bench: Bench) -> None:
    found = bench(
        fake_cluster.url, "--num-prompts", 3, "--input-len", 20, "--timeout", 0.1, "--num-warmups", 0, "--output-len",
        2000, "--ignore-eos",
    )  # fmt: skip

    assert found.code == 1
    assert "3 times: no whole answer within 0.1 s" in found.out


def test_what_the_server_refuses_is_said_before_the_load(fake_cluster: Cluster, bench: Bench) -> None:
    found = bench(fake_cluster.url, "--extra-body", '{"top_p": 7}')

    assert found.code == 1
    assert "did not serve the first request: status 400" in found.err
    assert "top_p" in found.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["http://127.0.0.1:1"], 1, "no answer from http://127.0.0.1:1"),
        (["http://127.0.0.1:1", "--goodput", "ttfb:3"], 1, "ttft, tpot, e2el"),
        (["http://127.0.0.1:1", "--load", "mooncake"], 2, "--file"),
        (["http://127.0.0.1:1", "--load", "chats", "--api", "completions"], 2, "--api"),
        (["http://127.0.0.1:1", "--extra-body", "["], 2, "--extra-body"),
        ([], 2, "URL"),
    ],
)
def test_what_cannot_be_run_is_refused(bench: Bench, arguments: list[str], code: int, says: str) -> None:
    found = bench(*arguments)

    assert found.code == code
    assert says in found.err


def _rounds(result: Path) -> list[dict[str, Any]]:
    [server] = json.loads(result.read_text())["servers"]
    rounds: list[dict[str, Any]] = server["rounds"]
    return rounds
