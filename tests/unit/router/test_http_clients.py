"""Foreign clients, and what operators see."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import openai
import pytest
from fake_nodes import ANSWER, FakeCluster, Script, fake_cluster, until
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

from kvrelay.protocol.messages.base import PromptWait

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def test_openai_client() -> None:
    def use(url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["demo"]
        chat = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=5, seed=0)
        assert chat.choices[0].message.content == ANSWER[:5]
        stream = client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=31,
            seed=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
        chunks = list(stream)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == ANSWER.encode()[:31].decode()
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 31
        assert chunks[-1].usage.prompt_tokens_details is not None
        completion = client.completions.create(model="demo", prompt=["a", "b"], n=2, max_tokens=4, seed=0)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
        assert caught.value.param == "temperature"
        client.close()

    async def scenario() -> None:
        async with fake_cluster() as cluster:
            await asyncio.to_thread(use, cluster.url)
            async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
                stream = await client.completions.create(model="demo", prompt="a", max_tokens=5, seed=0, stream=True)
                assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER[:5]
                left = await client.completions.create(model="demo", prompt="a", max_tokens=400, stream=True)
                async for _ in left:
                    break
                await left.close()
            await cluster.quiet()

    asyncio.run(scenario())


async def samples(cluster: FakeCluster) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await cluster.client.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_latencies_tokens_and_loads() -> None:
    async def scenario() -> None:
        async with fake_cluster(Script(in_step=True)) as cluster:  # times between tokens are those between chunks
            cluster.nodes[0].beat(
                num_running=3,
                gauges={"new_token.ratio": 0.5},
                counters={"preemptions": 2.0},
                prompt_tokens=[7, 0, 900],
                prompt_waits=[PromptWait([0, 4, 0, 0, 0, 0, 0, 0, 0, 1], 200.5)],
            )
            body = {"prompt": "abc", "max_tokens": 6}
            await cluster.client.post("/v1/completions", json=body)
            await cluster.quiet()
            await until(lambda: cluster.service.machine.requests.counters.kv_bytes_moved)
            found = await samples(cluster)
            assert found["kvrelay_requests_total", (("api", "completions"), ("outcome", "ok"))] == 1
            assert found["kvrelay_output_tokens_total", ()] == 6
            assert found["kvrelay_prompt_tokens_total", ()] == 3
            assert found["kvrelay_cached_prompt_tokens_total", ()] == 3
            assert found["kvrelay_ttft_seconds_count", ()] == 1
            assert found["kvrelay_itl_seconds_count", ()] == 5
            assert found["kvrelay_tpot_seconds_count", ()] == found["kvrelay_e2e_seconds_count", ()] == 1
            assert found["kvrelay_router_kv_bytes_moved_total", ()] == 1024
            assert found["kvrelay_requests_in_progress", (("status", "running"),)] == 0
            node = (("node", "n0"), ("role", "prefill"))
            assert found["kvrelay_node_num_running", node] == 3
            assert found["kvrelay_node_new_token_ratio", node] == 0.5
            assert found["kvrelay_node_preemptions_total", node] == 2
            short, long = ((*node[:1], ("prompt_tokens", name), *node[1:]) for name in ("<=128", "<=2048"))
            assert found["kvrelay_node_queued_prompt_tokens", short] == 7
            assert found["kvrelay_node_queued_prompt_tokens", long] == 900
            buckets = {
                dict(labels)["le"]: value
                for (name, labels), value in found.items()
                if name == "kvrelay_node_prompt_wait_seconds_bucket" and ("prompt_tokens", "<=128") in labels
            }
            assert (buckets["0.01"], buckets["0.03"], buckets["100.0"], buckets["+Inf"]) == (0, 4, 4, 5)
            assert found["kvrelay_node_prompt_wait_seconds_sum", short] == 200.5
            nodes = (await cluster.client.get("/cluster")).json()["nodes"]  # in the order in which they registered
            loads = {node["name"]: node["load"] for node in nodes}
            assert loads["n0"]["prompt_waits"] == [[[0, 4, 0, 0, 0, 0, 0, 0, 0, 1], 200.5]]

    asyncio.run(scenario())


def test_cluster_tells_nodes_and_requests() -> None:
    async def scenario() -> None:
        async with fake_cluster(Script(pace_s=0.002), "prefill decode mixed") as cluster:
            body = {"prompt": "abc", "max_tokens": 30}
            running = asyncio.create_task(cluster.client.post("/v1/completions", json=body))
            await until(lambda: len(cluster.service.machine.requests) == 1)
            status = (await cluster.client.get("/cluster")).json()
            assert status["ready"] is True
            assert status["requests"]["running"] == 1
            nodes = {node["name"]: node for node in status["nodes"]}
            assert {name: node["role"] for name, node in nodes.items()} == {
                "n0": "prefill",
                "n1": "decode",
                "n2": "mixed",
            }
            assert sum(node["num_requests"] for node in nodes.values()) >= 1
            assert nodes["n0"]["load"]["num_running"] == 0
            cluster.service.drain("n2", stay_down=False)
            await until(lambda: [node for node in cluster.service.machine.node_table if node.leaving])
            nodes_now = (await cluster.client.get("/cluster")).json()["nodes"]
            assert {node["name"]: node["state"] for node in nodes_now} == {
                "n0": "ready",
                "n1": "ready",
                "n2": "draining",
            }
            assert (await running).status_code == 200
            assert (await cluster.client.get("/ready")).status_code == 200

    asyncio.run(scenario())


def test_router_imports_neither_paddle_nor_redis() -> None:
    code = "import sys, router.__main__; sys.exit(any(name in sys.modules for name in ('paddle', 'redis', 'fastapi')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
