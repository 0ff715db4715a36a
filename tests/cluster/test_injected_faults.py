"""A cluster with faults injected by its config: clients get their tokens, and everybody is told of the faults."""

from __future__ import annotations

from pathlib import Path

from support.asking import Ask, answers, assert_right, random_asks
from support.cluster import running
from support.cluster_config import cluster_config, d, fake_engine, p

MISHAPS = {"delay": 0.1, "overtake": 0.02, "duplicate": 0.05}


def test_a_cluster_serves_while_messages_store_and_processes_misbehave(model: Path) -> None:
    config = cluster_config(
        model,
        p("p0"),
        d("d0"),
        d("d1"),
        engine=fake_engine(step_s=0.002),
        transfer={"link": "tcp"},
        cache={"num_blocks": 64},
        storage={"backend": "memory"},
        faults={
            "messages": {"*": MISHAPS, "Heartbeat": {"drop": 0.2}, "KVFrame": {"corrupt": 0.01, **MISHAPS}},
            "max_delay_s": 0.02,
            "store_delay_rate": 0.2,
            "store_delay_s": 0.2,
            "stop_every_s": 4.0,
            "stop_s": 0.5,
        },
    )
    with running(config) as cluster:
        asks = [Ask(ask.prompt, 60, ask.temperature, ask.seed) for ask in random_asks(91, 24)]
        assert assert_right(cluster, asks, answers(cluster, asks, limit=8)) == len(asks)
        log = cluster.log()
    assert "FAULTS ARE INJECTED ON PURPOSE in router, p0, d0, d1" in log
    for name in ("router", "p0", "d0", "d1"):
        lines = [line for line in log.splitlines() if line.lstrip().startswith(name)]
        assert any("faults are injected on purpose" in line for line in lines), name
