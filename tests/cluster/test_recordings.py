"""Recordings of real processes: each machine does the same again in another process, from its file alone."""

from __future__ import annotations

import random
from pathlib import Path

from support.asking import Ask, answers, random_prompt
from support.cluster import Cluster

from kvrelay.cluster import operate
from kvrelay.cluster.client import ClusterClient
from kvrelay.cluster.replay import replay
from kvrelay.recording.recording_file import opened


def test_every_process_of_a_cluster_does_the_same_again(fake_cluster: Cluster) -> None:
    rng = random.Random(5)
    answers(fake_cluster, [Ask(random_prompt(rng, rng.randint(1, 200)), 8) for _ in range(8)], limit=8)
    said: list[str] = []
    with ClusterClient(str(fake_cluster.admin.base_url)) as client:
        for name in ("router", "p0", "d0"):
            operate.dump(client, name, prompts=True, say=said.append)
    paths = {process: Path(path) for process, path in (line.split(": ", 1) for line in said)}
    assert sorted(paths) == ["d0", "d0.messager", "p0", "p0.messager", "router"]
    for process, path in paths.items():
        with opened(path) as (header, records):
            assert header.process == process
            assert sum(1 for _ in records) > 10
        assert replay(path, said.append), said
