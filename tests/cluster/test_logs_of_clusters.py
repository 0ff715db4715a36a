"""Logs as JSON, for collectors: what ``kvrelay up`` writes when nobody looks at it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from support.cluster import PATIENCE_S, Cluster
from support.cluster_config import cluster_config, d, fake_engine, p


def test_every_line_is_an_object_and_requests_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVRELAY_CLUSTER__LOG_FORMAT")
    cluster = Cluster(cluster_config(model, p(), d(), engine=fake_engine()))
    try:
        cluster.start()
        cluster.wait_until_up()
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 4}
        headers = {"X-Request-Id": "seven", "Authorization": "Bearer sk-secret-1"}
        assert cluster.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.process.wait(PATIENCE_S) == 0
        lines: list[dict[str, Any]] = [json.loads(line) for line in cluster.log().splitlines()]
        assert "sk-secret-1" not in cluster.log()
    finally:
        cluster.close()

    assert all({"time", "level", "process", "event"} <= line.keys() for line in lines)
    assert {"kvrelay", "router", "p0", "d0", "p0.messager", "d0.messager"} <= {line["process"] for line in lines}
    (request,) = [line for line in lines if line.get("request_id") == "seven"]
    assert (request["event"], request["process"], request["level"]) == ("http request", "router", "info")
    assert (request["status"], request["prompt_tokens"], request["completion_tokens"]) == (200, 3, 4)
    assert {"process": "d0", "event": "stage", "stage": "connecting"}.items() <= next(
        line for line in lines if line.get("stage") == "connecting" and line["process"] == "d0"
    ).items()
