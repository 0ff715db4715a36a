"""Traces in Chrome's JSON format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvrelay.cluster.client import ClusterClient
from kvrelay.cluster.trace import trace_of, write_trace
from kvrelay.errors import KVRelayError

MARKS = [
    ("router", "received", 100.0),
    ("router", "dispatched", 100.001),
    ("p0", "queued", 100.002),
    ("p0", "prefill", 100.003),
    ("d0", "reserved", 100.004),
    ("p0", "reserved", 100.005),
    ("p0", "first_token", 100.032),
    ("p0", "hand_off", 100.032),
    ("d0", "handed_off", 100.033),
    ("d0", "kv_arrived", 100.034),
    ("d0", "decode", 100.035),
    ("p0", "transferred", 100.036),
    ("d0", "done", 100.116),
    ("router", "done", 100.117),
]


def timeline(request_id: str) -> dict[str, Any]:
    layer = {"first_sent_s": 100.02, "last_written_s": 100.03, "num_bytes": 8}
    return {
        "request_id": request_id,
        "marks": [{"node": node, "name": name, "at_s": at_s} for node, name, at_s in MARKS],
        "layers": [{"layer": index, **layer} for index in range(2)],
        "kv_bytes_moved": 16,
    }


def test_every_process_and_phase_of_a_request_is_in_its_trace() -> None:
    trace = trace_of([timeline("a")])
    events = trace["traceEvents"]
    process = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = {(process[e["pid"]], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}

    assert set(process.values()) == {"router", "p0", "d0", "transfer"}
    assert spans["router", "request"] == (0, pytest.approx(117_000))
    assert spans["p0", "prefill"] == (3000, pytest.approx(29_000))
    assert spans["d0", "decode"] == (35_000, pytest.approx(81_000))
    assert spans["transfer", "layer 1"] == (20_000, pytest.approx(10_000))
    assert sum(e["ph"] == "i" for e in events) == len(MARKS)


def test_spans_of_a_thread_never_overlap_and_requests_have_threads_of_their_own() -> None:
    events = trace_of([timeline("a"), timeline("b")])["traceEvents"]
    ends: dict[tuple[int, int], float] = {}
    of_request: dict[tuple[int, int], str] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        thread = event["pid"], event["tid"]
        assert ends.get(thread, 0.0) <= event["ts"] + 0.5
        ends[thread] = event["ts"] + event["dur"]
        assert of_request.setdefault(thread, event["args"]["request_id"]) == event["args"]["request_id"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {names[thread].split()[0] for thread in ends} == {"a", "b"}


def test_an_arrow_leads_from_the_hand_off_to_the_decode() -> None:
    events = trace_of([timeline("a")])["traceEvents"]
    [start], [finish] = ([e for e in events if e["ph"] == kind] for kind in "sf")

    assert start["id"] == finish["id"]
    assert (start["ts"], finish["ts"]) == (32_000, 35_000)
    assert start["pid"] != finish["pid"]


def _cluster(known: list[str], dropped: str = "") -> ClusterClient:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/cluster/requests":
            count = int(request.url.params["limit"])
            return httpx.Response(200, json={"requests": [{"request_id": each} for each in known[:count]]})
        request_id = request.url.path.rpartition("/")[2]
        if request_id == dropped:
            return httpx.Response(404, json={"error": {"message": f"no request {dropped} is in progress"}})
        return httpx.Response(200, json=timeline(request_id))

    return ClusterClient("http://router", transport=httpx.MockTransport(answer))


def test_the_newest_requests_are_written_or_one_by_its_id(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with _cluster(["c", "b", "a"]) as cluster:
        assert write_trace(cluster, path, None, 2) == 2
        names = [event["args"]["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "M"]
        assert {"b", "c"} <= set(names)
        assert "a" not in names
        assert write_trace(cluster, path, "x", 2) == 1


def test_a_timeline_that_the_router_drops_meanwhile_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with _cluster(["c", "b", "a"], dropped="a") as cluster:
        assert write_trace(cluster, path, None, 3) == 2
        with pytest.raises(KVRelayError, match="no request a"):
            write_trace(cluster, path, "a", 3)


def test_nothing_to_write_and_nowhere_to_write_it_are_errors(tmp_path: Path) -> None:
    with _cluster([]) as cluster, pytest.raises(KVRelayError, match="no timeline"):
        write_trace(cluster, tmp_path / "trace.json", None, 2)
    with _cluster(["a"]) as cluster, pytest.raises(KVRelayError, match=r"trace\.json: No such file"):
        write_trace(cluster, tmp_path / "none" / "trace.json", None, 2)
