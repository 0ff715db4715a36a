"""Limits of the time to first token, as clients see them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_nodes import FakeCluster, Script, fake_cluster, until

TTFT: dict[str, Any] = {"prefill_routing": "ttft", "decode_routing": "ttft"}
HEADER = "x-llm-d-slo-ttft-ms"
BODY = {"prompt": list(range(5, 25)), "max_tokens": 2}
"""20 tokens: two seconds on a node that computes 10 a second."""


def run(scenario: Callable[[FakeCluster], Awaitable[None]], script: Script | None = None, **options: Any) -> None:
    async def main() -> None:
        async with fake_cluster(script, **{"roles": "mixed", **TTFT, **options}) as cluster:
            cluster.nodes[0].beat(prefill_tokens_per_s=10.0, free_blocks=64)
            [node] = cluster.service.machine.node_table
            await until(lambda: node.load.prefill_tokens_per_s)
            await scenario(cluster)
            await cluster.quiet()

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_first_token_that_would_be_late_is_429_with_retry_after(path: str, streaming: bool) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        said = [{"role": "user", "content": "hello"}]
        bodies: dict[str, dict[str, Any]] = {
            "/v1/completions": BODY,
            "/v1/chat/completions": {"messages": said},
            "/v1/responses": {"input": said},
            "/v1/messages": {"messages": said, "max_tokens": 2},
        }
        body = {**bodies[path], "model": "demo", "stream": streaming}
        refused = await cluster.client.post(path, json=body, headers={HEADER: "100"})
        assert refused.status_code == 429, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert "the limit is 0.1 s" in refused.json()["error"]["message"]
        assert cluster.script.specs == []  # no node has heard of it

    run(scenario)


def test_the_error_names_the_header_and_tells_when_to_come_back() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        refused = await cluster.client.post("/v1/completions", json=BODY, headers={HEADER: "500"})
        assert refused.json()["error"] == {
            "message": "the first token is predicted after 2 s: 0 s for other prompts and 2 s for this one; "
            f"the limit is 0.5 s ({HEADER})",
            "type": "rate_limit_error",
            "param": HEADER,
            "code": "ttft_limit_exceeded",
        }
        assert refused.headers["retry-after"] == "2"
        served = await cluster.client.post("/v1/completions", json=BODY, headers={HEADER: "2000.5"})
        assert served.status_code == 200

    run(scenario)


def test_the_limit_of_the_config_holds_where_the_client_gives_none() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        refused = await cluster.client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["param"]) == (429, None)
        assert "(router.ttft_slo_s)" in refused.json()["error"]["message"]
        served = await cluster.client.post("/v1/completions", json=BODY, headers={HEADER: "10000"})
        assert served.status_code == 200
        metrics = (await cluster.client.get("/metrics")).text
        assert "kvrelay_router_refused_for_ttft_total 1.0" in metrics
        assert 'kvrelay_ttft_prediction_error_seconds_count{direction="early"} 1.0' in metrics
        assert 'kvrelay_node_prefill_tokens_per_second{node="n0",role="mixed"} 10.0' in metrics

    run(scenario, ttft_slo_s=1.0)


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "1e3", "fast", "86400001", "٣", "1" * 400])
def test_a_header_that_is_no_time_is_400(value: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        refused = await cluster.client.post("/v1/completions", json=BODY, headers=[(HEADER.encode(), value.encode())])
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request_error", HEADER)
        assert error["message"].endswith("above 0 and at most 86,400,000")

    run(scenario)


def test_with_another_policy_the_header_is_not_used() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        served = await cluster.client.post("/v1/completions", json=BODY, headers={HEADER: "1"})
        assert served.status_code == 200

    run(scenario, prefill_routing="least_loaded", decode_routing="least_loaded")
