"""``/metrics`` of the router and of each node, as Prometheus and inference gateways read them."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import yaml
from support.asking import Ask, answers, assert_right, random_prompt
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import cluster_config, d, fake_engine, p
from support.prometheus_server import prometheus
from support.scrapes import all_samples, as_gateway, families, samples, value

from kvrelay.metrics import vllm
from kvrelay.protocol.histograms import STAGES

DOCS = Path(__file__).parents[2] / "docs"
NUM_ASKS = 24
NUM_BLOCKS = 40
LABELS = {"model_name": "demo", "engine": "0"}


class Scrapes:
    """A cluster after a load, and its scrapes by process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.text = {"router": cluster.http.get("/metrics").text}
        for node in cluster.config.nodes:
            assert node.metrics_address is not None
            host, port = node.metrics_address
            assert host == "127.0.0.1"
            answer = httpx.get(f"http://{host}:{port}/metrics", timeout=PATIENCE_S, trust_env=False)
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            self.text[node.name] = answer.text


@pytest.fixture(scope="module")
def scrapes(model: Path) -> Iterator[Scrapes]:
    """A load on 1P1D: prompts that share their beginning, more outputs than D has blocks for."""
    config = cluster_config(
        model,
        p(),
        d(),
        metrics=True,
        cache={"num_blocks": NUM_BLOCKS},
        engine=fake_engine(step_s=0.002),
        scheduler={"reserve_policy": "none", "watermark": 0.0},
    )
    with running(config) as cluster:
        until("both nodes have reported", lambda: all(node["num_heartbeats"] for node in cluster.status()["nodes"]))
        rng = random.Random(7)
        shared = random_prompt(rng, 48)
        asks = [Ask([*shared, *random_prompt(rng, rng.randint(1, 60))], 120, seed=seed) for seed in range(NUM_ASKS)]
        assert assert_right(cluster, asks, answers(cluster, asks, limit=12)) == NUM_ASKS
        cluster.wait_until_quiescent()
        yield Scrapes(cluster)


def test_a_gateway_reads_the_state_of_each_server(scrapes: Scrapes) -> None:
    states = {name: as_gateway(text) for name, text in scrapes.text.items()}

    assert {(state.num_waiting, state.num_running) for state in states.values()} == {(0, 0)}
    assert {state.block_size for state in states.values()} == {16}
    assert {name: state.num_blocks for name, state in states.items()} == dict.fromkeys(states, NUM_BLOCKS)
    assert {state.kv_usage for state in states.values()} == {0.0}


@pytest.mark.parametrize("process", ["router", "p0", "d0"])
def test_histograms_have_the_buckets_of_vllm(scrapes: Scrapes, process: str) -> None:
    bounds = {
        "vllm:time_to_first_token_seconds": vllm.FIRST_TOKEN_BOUNDS_S,
        "vllm:inter_token_latency_seconds": vllm.TOKEN_BOUNDS_S,
        "vllm:request_time_per_output_token_seconds": vllm.TOKEN_BOUNDS_S,
        "vllm:e2e_request_latency_seconds": vllm.REQUEST_BOUNDS_S,
        "vllm:request_queue_time_seconds": vllm.REQUEST_BOUNDS_S,
        "vllm:request_prefill_time_seconds": vllm.REQUEST_BOUNDS_S,
        "vllm:request_decode_time_seconds": vllm.REQUEST_BOUNDS_S,
        "vllm:request_inference_time_seconds": vllm.REQUEST_BOUNDS_S,
    }
    text = scrapes.text[process]
    for name, expected in bounds.items():
        buckets = samples(text, f"{name}_bucket", **LABELS)
        assert [bucket.labels["le"] for bucket in buckets] == [*map(str, expected), "+Inf"]
        counts = [bucket.value for bucket in buckets]
        assert all(before <= after for before, after in pairwise(counts))
        assert counts[-1] == value(text, f"{name}_count", **LABELS)


def test_the_router_counts_requests_and_tokens_once(scrapes: Scrapes) -> None:
    text, status = scrapes.text["router"], scrapes.cluster.status()
    num_prompt = value(text, "kvrelay_prompt_tokens_total")

    assert value(text, "vllm:prompt_tokens_total", **LABELS) == num_prompt
    assert value(text, "vllm:generation_tokens_total", **LABELS) == value(text, "kvrelay_output_tokens_total")
    by_source = {
        sample.labels["source"]: sample.value
        for sample in samples(text, "vllm:prompt_tokens_by_source_total", **LABELS)
    }
    assert by_source.keys() == set(vllm.SOURCES)
    assert sum(by_source.values()) == num_prompt
    assert by_source["local_cache_hit"] == value(text, "vllm:prefix_cache_hits_total", **LABELS) > 0
    assert value(text, "vllm:prefix_cache_queries_total", **LABELS) == num_prompt
    finished = sum(sample.value for sample in samples(text, "vllm:request_success_total", **LABELS))
    assert finished == status["requests"]["finished"] == NUM_ASKS
    for name in ("time_to_first_token", "e2e_request_latency", "request_inference_time", "request_queue_time"):
        assert value(text, f"vllm:{name}_seconds_count", **LABELS) == NUM_ASKS
    preemptions = scrapes.cluster.counters()["preemptions"]
    assert value(text, "vllm:num_preemptions_total", **LABELS) == preemptions > 0


def test_nodes_count_their_own_part(scrapes: Scrapes) -> None:
    prefill, decode = scrapes.text["p0"], scrapes.text["d0"]
    sources = {
        process: {
            sample.labels["source"]: sample.value
            for sample in samples(scrapes.text[process], "vllm:prompt_tokens_by_source_total", **LABELS)
        }
        for process in ("p0", "d0")
    }
    num_prompt = value(scrapes.text["router"], "kvrelay_prompt_tokens_total")
    assert {process: sum(tokens.values()) for process, tokens in sources.items()} == {
        "p0": num_prompt,
        "d0": num_prompt,
    }
    assert sources["p0"]["external_kv_transfer"] == 0 == sources["d0"]["local_compute"]
    assert sources["d0"]["external_kv_transfer"] > 0
    assert value(prefill, "vllm:request_prefill_time_seconds_count", **LABELS) == NUM_ASKS
    assert value(decode, "vllm:request_decode_time_seconds_count", **LABELS) == NUM_ASKS
    assert value(decode, "vllm:num_preemptions_total", **LABELS) > 0
    generated = value(prefill, "vllm:generation_tokens_total") + value(decode, "vllm:generation_tokens_total")
    assert generated == value(scrapes.text["router"], "vllm:generation_tokens_total")


def test_each_stage_has_a_histogram(scrapes: Scrapes) -> None:
    """The router's scrape has what both nodes reported, and each node's own scrape its part."""
    text = scrapes.text["router"]
    counted = {
        (sample.labels["node"], sample.labels["stage"]): sample.value
        for sample in samples(text, "kvrelay_node_stage_seconds_count")
    }
    assert {stage for _, stage in counted} == set(STAGES)
    assert counted["p0", "reservation"] == counted["d0", "hand_off"] == NUM_ASKS
    (link,) = {sample.labels["link"] for sample in samples(text, "kvrelay_node_kv_transfer_bytes_count")}
    assert link == "shm"
    assert value(text, "kvrelay_node_kv_transfer_bytes_count") == NUM_ASKS
    moved = scrapes.cluster.loads()["p0"]["counters"]["kv_bytes_sent"]
    assert value(text, "kvrelay_node_kv_transfer_bytes_sum") == moved
    hidden = samples(text, "kvrelay_node_kv_transfer_hidden_ratio_bucket", le="1.0", link="shm")
    assert hidden[0].value == value(text, "kvrelay_node_kv_transfer_hidden_ratio_count") > 0
    own = {sample.labels["stage"] for sample in samples(scrapes.text["p0"], "kvrelay_node_stage_seconds_count")}
    assert own == {stage for node, stage in counted if node == "p0"}


@pytest.mark.parametrize("process", ["router", "p0", "d0"])
def test_every_family_is_there_once_with_help(scrapes: Scrapes, process: str) -> None:
    for family in families(scrapes.text[process]).values():
        assert family.documentation


def test_a_port_in_use_is_named_before_anything_starts(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = cluster_config(
            model, {**p(), "metrics_port": taken.getsockname()[1]}, d(), engine=fake_engine(), cache={"num_blocks": 64}
        )
        cluster = Cluster(config)
        try:
            cluster.start()
            assert cluster.process.wait(PATIENCE_S) == 2
            assert "nodes.p0.metrics_port: cannot listen at 127.0.0.1" in cluster.log()
        finally:
            cluster.close()


@pytest.mark.parametrize("where", ["grafana/kvrelay.json", "alerts/kvrelay.rules.yml"])
def test_each_query_of_the_docs_is_of_metrics_that_there_are(scrapes: Scrapes, where: str) -> None:
    there = {sample.name for sample in all_samples(scrapes.text["router"])}
    labels = {label for sample in all_samples(scrapes.text["router"]) for label in sample.labels} | {"instance"}
    queries = dashboard_queries(DOCS / where) if where.endswith(".json") else alert_queries(DOCS / where)
    assert len(queries) > 10
    for query in queries:
        names = metrics_of(query)
        assert names, query
        assert names <= there, query
        assert labels_of(query) <= labels, query


def dashboard_queries(path: Path) -> list[str]:
    """Return the queries of a Grafana dashboard. Its panels use the data source that the user chooses."""
    panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["description"] for panel in panels)
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_queries(path: Path) -> list[str]:
    """Return the queries of Prometheus rules. Each says what it means."""
    rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules)
    return [rule["expr"] for rule in rules]


def metrics_of(query: str) -> set[str]:
    """Return the metrics in a PromQL query: names that are no function, no keyword and not in braces."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without)\s*\([^)]*\)", " ", query)
    return {name for name in re.findall(r"[a-zA-Z_:][\w:]*\b(?!\s*\()", bare) if name not in ("and", "or", "unless")}


def labels_of(query: str) -> set[str]:
    """Return the labels that a PromQL query groups by or selects."""
    groups = ",".join(re.findall(r"\bby\s*\(([^)]*)\)", query)).split(",")
    return {name.strip() for name in groups if name.strip()} | set(re.findall(r"(\w+)=~?\"", query))


@pytest.mark.parametrize("process", ["router", "p0", "d0"])
def test_promtool_has_no_complaints(scrapes: Scrapes, process: str) -> None:
    """Of vLLM's names it only dislikes the colon, which is vLLM's."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    text = scrapes.text[process].replace("vllm:", "vllm_")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_promtool_has_no_complaints_about_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    rules = str(DOCS / "alerts/kvrelay.rules.yml")
    checked = subprocess.run([promtool, "check", "rules", rules], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_prometheus_scrapes_all_and_evaluates_the_rules(scrapes: Scrapes, tmp_path: Path) -> None:
    addresses = [node.metrics_address for node in scrapes.cluster.config.nodes]
    nodes = [f"{host}:{port}" for host, port in filter(None, addresses)]
    router = str(scrapes.cluster.http.base_url.netloc, "ascii")
    with prometheus(tmp_path, [router, *nodes], DOCS / "alerts/kvrelay.rules.yml") as server:
        until("all are scraped", lambda: {health for health, _ in server.targets().values()} == {"up"})
        until("the rules are evaluated", lambda: not server.unhealthy_rules())
        query = 'sum by (instance) (vllm:request_success_total{model_name="demo"})'
        served = ({"instance": router}, float(NUM_ASKS))
        until("the router's requests are counted", lambda: served in server.query(query))
        assert set(server.targets()) == {router, *nodes}


def test_idle_processes_check_themselves_and_find_nothing(scrapes: Scrapes) -> None:
    def counted(name: str) -> list[float]:
        text = scrapes.cluster.http.get("/metrics").text
        kinds = ("router", "node", "node_messager")
        return [sample.value for kind in kinds for sample in samples(text, f"kvrelay_{kind}_{name}_total")]

    until("router, nodes and messagers have checked", lambda: len([c for c in counted("self_checks") if c > 0]) == 5)
    assert counted("self_check_violations") == [0.0] * 5
