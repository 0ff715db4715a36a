"""One request on a real model: what is told of it, and what is left when its client leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from support.asking import Ask, Asker, answers, play
from support.cluster import Cluster, until

pytestmark = [pytest.mark.timeout(300), pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)]

NUM_LAYERS = 4


def test_timeline_tells_every_phase_and_every_layers_transfer(real_cluster: Cluster) -> None:
    (answer,) = answers(real_cluster, [Ask(list(range(100, 200)), 8)])
    real_cluster.wait_until_quiescent()

    timeline = real_cluster.http.get(f"/cluster/requests/{answer.body['id']}").json()

    marks = {mark["name"]: mark["at_s"] for mark in timeline["marks"]}
    expected = ["received", "dispatched", "queued", "prefill", "reserved", "first_token", "hand_off", "decode", "done"]
    assert not set(expected) - marks.keys()
    assert marks["received"] <= marks["prefill"] <= marks["hand_off"] <= marks["decode"] <= marks["done"]
    layers = timeline["layers"]
    assert [layer["layer"] for layer in layers] == list(range(NUM_LAYERS))
    # D may know that all is written, and decode, before P hears of it
    assert all(marks["prefill"] <= layer["first_sent_s"] <= marks["decode"] for layer in layers)
    assert all(layer["first_sent_s"] <= layer["last_written_s"] <= marks["transferred"] for layer in layers)
    assert timeline["kv_bytes_moved"] == sum(layer["num_bytes"] for layer in layers) > 0


@pytest.mark.fault("F08")
def test_client_gone_in_mid_stream_frees_both_nodes(real_cluster: Cluster) -> None:
    aborted = real_cluster.status()["requests"]["aborted"]

    async def leave(asker: Asker) -> None:
        async with asker.streaming("/v1/completions", Ask(list(range(3, 300)), 3000).body) as parts:
            for _ in range(5):
                await anext(parts)
            until("a decode node says that it decodes", lambda: any_load(real_cluster, "num_running"))

    play(real_cluster, leave)
    until("nobody holds blocks", lambda: not any_load(real_cluster, "num_running", "num_sending", "used_blocks"))

    assert real_cluster.status()["requests"]["aborted"] == aborted + 1


def any_load(cluster: Cluster, *names: str) -> bool:
    return any(load[name] for load in cluster.loads().values() for name in names)


def test_only_nodes_have_loaded_paddle(real_cluster: Cluster) -> None:
    titles = real_cluster.lasting()
    with_paddle = {title for pid, title in titles.items() if "paddle" in Path(f"/proc/{pid}/maps").read_text()}

    assert with_paddle == {"kvrelay prefill p0", *(f"kvrelay decode d{index}" for index in range(3))}
    assert len(titles) == 2 + 4 + 4, titles
    assert all(psutil.Process(pid).children() for pid in (real_cluster.pid("p0"), real_cluster.pid("d0")))
