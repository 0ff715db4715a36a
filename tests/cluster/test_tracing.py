"""Traces of a cluster of real processes: OpenTelemetry spans at a collector, and ``kvrelay trace``."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest
from support.cluster import Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, m, p

from kvrelay.cluster.cli import main

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ("prefill", "receive", "decode", "transfer")
PROMPT = {"model": "demo", "prompt": [7] * 40, "max_tokens": 6, "ignore_eos": True}


class Span(NamedTuple):
    """A span as the collector gets it; ``node`` is the process whose it is."""

    name: str
    node: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, str]


class Collector:
    """Keeps what is sent over OTLP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"

    @contextmanager
    def serving(self) -> Iterator[Collector]:
        """Take spans for the context."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def of(self, trace_id: str, *names: str) -> list[Span]:
        """Return the spans of a trace when those called ``names`` are there; they may come in several parts."""
        wanted = Counter(names)

        def look() -> list[Span] | None:
            found = [span for span in self.spans if span.trace_id == trace_id]
            return found if wanted <= Counter(span.name for span in found) else None

        return until(f"spans of {trace_id}: {', '.join(names)}", look)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                spans.extend(
                    _span(span, _plain(of_process.resource.attributes)["service.instance.id"])
                    for of_process in ExportTraceServiceRequest.FromString(body).resource_spans
                    for scope in of_process.scope_spans
                    for span in scope.spans
                )
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _span(span: Any, node: str) -> Span:
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    return Span(span.name, node, *ids, span.start_time_unix_nano, span.end_time_unix_nano, _plain(span.attributes))


def _plain(attributes: Any) -> dict[str, str]:
    return {each.key: str(each.value.string_value or each.value.int_value) for each in attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry (kvrelay[otel]) is not installed")
    with Collector().serving() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector, model: Path) -> Iterator[Cluster]:
    """1P1D that sends traces of whoever wants them, and of a tenth of the others."""
    router = {"otlp_endpoint": collector.url, "trace_sample_ratio": 0.0}
    with running(cluster_config(model, p(), d(), engine=fake_engine(step_s=0.002), router=router)) as cluster:
        yield cluster


def test_a_span_for_each_phase_hangs_below_the_clients(traced: Cluster, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
    response = traced.http.post("/v1/completions", json={**PROMPT, "n": 2}, headers=headers)
    assert response.status_code == 200, response.text
    spans = collector.of(TRACE_ID, "POST /v1/completions", *("request", *PHASES) * 2)

    [served] = [span for span in spans if span.name == "POST /v1/completions"]
    assert (served.node, served.parent_id) == ("router", PARENT_ID)
    assert served.attributes["http.response.status_code"] == "200"
    assert response.headers["traceparent"] == f"00-{TRACE_ID}-{served.span_id}-01"
    assert response.headers["tracestate"] == "vendor=1"
    requests = [span for span in spans if span.name == "request"]
    assert len(requests) == 2
    assert {request.parent_id for request in requests} == {served.span_id}
    assert len({span.span_id for span in spans}) == len(spans)
    for request in requests:
        request_id = request.attributes["kvrelay.request_id"]
        assert request_id.startswith(response.json()["id"])
        below = [span for span in spans if span.parent_id == request.span_id]
        assert {span.attributes["kvrelay.request_id"] for span in below} == {request_id}
        nodes = {(span.node, span.name) for span in below}
        assert {("p0", "prefill"), ("d0", "decode"), ("d0", "receive"), ("transfer", "transfer")} <= nodes
        assert all(served.start_ns <= span.start_ns <= span.end_ns for span in below)


@pytest.mark.parametrize("given", [None, f"00-{TRACE_ID[::-1]}-{PARENT_ID}-00", "nonsense", "00-" + "0" * 32])
def test_what_is_not_sampled_sends_nothing(traced: Cluster, collector: Collector, given: str | None) -> None:
    before = {span.trace_id for span in collector.spans}
    response = traced.http.post("/v1/completions", json=PROMPT, headers={"traceparent": given} if given else {})
    marker = uuid4().hex
    traced.http.post(
        "/v1/completions", json=PROMPT, headers={"traceparent": f"00-{marker}-{PARENT_ID}-01"}
    ).raise_for_status()
    collector.of(marker, "POST /v1/completions", "request", *PHASES)

    flags = int(response.headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1  # not sampled
    assert {span.trace_id for span in collector.spans} <= before | {marker}


def test_every_endpoint_that_generates_is_traced(traced: Cluster, collector: Collector) -> None:
    message = [{"role": "user", "content": "a b"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": message, "max_tokens": 2},
        "/v1/responses": {"input": "a b", "max_output_tokens": 16},
        "/v1/messages": {"messages": message, "max_tokens": 2},
    }
    for number, (path, body) in enumerate(bodies.items()):
        trace_id = f"{number + 1:032x}"
        headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
        response = traced.http.post(path, json={"model": "demo", **body}, headers=headers)
        assert response.status_code == 200, response.text
        names = {span.name for span in collector.of(trace_id, f"POST {path}", "request", "prefill")}
        assert {f"POST {path}", "request", "prefill"} <= names


def test_a_request_that_is_refused_has_its_span(traced: Cluster, collector: Collector) -> None:
    trace_id = TRACE_ID[2:] + "aa"
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    assert traced.http.post("/v1/completions", json={**PROMPT, "n": -1}, headers=headers).status_code == 400
    [span] = collector.of(trace_id, "POST /v1/completions")

    assert span.attributes["http.response.status_code"] == "400"


def test_a_collector_that_is_down_costs_no_request_and_no_orderly_end(collector: Collector, model: Path) -> None:
    router = {"otlp_endpoint": "http://127.0.0.1:1/v1/traces"}
    with running(cluster_config(model, m(), engine=fake_engine(), router=router)) as cluster:
        for _ in range(3):
            assert cluster.http.post("/v1/completions", json=PROMPT).status_code == 200


def test_workers_of_the_router_send_traces(collector: Collector, model: Path) -> None:
    trace_id = TRACE_ID[3:] + "bbb"
    router = {"otlp_endpoint": collector.url, "workers": 2}
    with running(cluster_config(model, m(), engine=fake_engine(), router=router)) as cluster:
        headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
        assert cluster.http.post("/v1/completions", json=PROMPT, headers=headers).status_code == 200
    # they end with what they have, without waiting until it is time to send it
    names = {
        (span.node, span.name)
        for span in collector.of(trace_id, "POST /v1/completions", "request", "prefill", "decode")
    }
    assert {("router", "POST /v1/completions"), ("router", "request"), ("m0", "prefill"), ("m0", "decode")} <= names


def test_without_an_endpoint_nothing_of_it_is_imported(fake_cluster: Cluster) -> None:
    code = "import sys, router.server; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    assert "traceparent" not in fake_cluster.http.post("/v1/completions", json=PROMPT, headers=headers).headers


# ---------------------------------------------------------------- kvrelay trace


def test_the_newest_requests_are_listed_and_traced(
    fake_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [fake_cluster.http.post("/v1/completions", json=PROMPT).json()["id"] for _ in range(3)]
    fake_cluster.wait_until_quiescent()

    listed = fake_cluster.admin.get("/cluster/requests?limit=2").json()["requests"]
    assert [item["request_id"] for item in listed] == [ids[2], ids[1]]
    assert all(item["received_s"] <= item["first_token_s"] <= item["done_s"] for item in listed)
    assert {"p0"} <= set(listed[0]["nodes"])
    path = tmp_path / "trace.json"
    admin = str(fake_cluster.admin.base_url)
    monkeypatch.setattr(sys, "argv", ["kvrelay", "trace", "--url", admin, "-n", "2", "-o", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr()
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["args"]["request_id"] for event in events if event["ph"] == "X"} == {ids[1], ids[2]}
    assert {"prefill", "decode", "transfer", "layer 0"} <= {event["name"] for event in events}


@pytest.mark.parametrize("limit", ["0", "257", "-1", "x", "", "1" * 50, "٣"])
def test_a_limit_out_of_bounds_is_refused(fake_cluster: Cluster, limit: str) -> None:
    response = fake_cluster.admin.get("/cluster/requests", params={"limit": limit})

    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request_error")


def test_clients_cannot_list_requests(fake_cluster: Cluster) -> None:
    assert fake_cluster.http.get("/cluster/requests").status_code == httpx.codes.NOT_FOUND
