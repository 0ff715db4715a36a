"""Clusters that several tests share. Each test must leave them quiescent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from golden.cases import CASES

from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, fake_engine, m, p

WriteCheckpoint = Callable[[str], Path]

_SHARED = ("fake_cluster", "real_cluster", "mixed_node")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> WriteCheckpoint:
    """Gives the directory of the golden checkpoint of an architecture."""
    directory = tmp_path_factory.mktemp("checkpoints")
    cases = {case.name: case for case in CASES}

    def written(arch: str) -> Path:
        path = directory / arch
        if not path.exists():
            cases[arch].write_checkpoint(path)
        return path

    return written


@pytest.fixture(scope="session")
def model(checkpoint: WriteCheckpoint) -> Path:
    """A checkpoint, for those who only want its tokenizer."""
    return checkpoint("qwen2")


@pytest.fixture(scope="session")
def fake_cluster(model: Path) -> Iterator[Cluster]:
    """1P3D with fake engines: real processes and sockets, tokens that only come out right if the KV does."""
    config = cluster_config(
        model,
        p(),
        *(d(f"d{index}") for index in range(3)),
        cache={"num_blocks": 1024},
        router={"max_queued_requests": 192},
        engine=fake_engine(step_s=0.002),
        recording={"max_bytes": "256MiB"},  # all that its tests do
    )
    with running(config) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def real_cluster(request: pytest.FixtureRequest, checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    """1P3D with the checkpoint of the architecture in ``request.param``; there is one such cluster at a time."""
    nodes = [p(), *(d(f"d{index}") for index in range(3))]
    with running(cluster_config(checkpoint(request.param), *nodes, cache={"num_blocks": 1024})) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mixed_node(checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    """One mixed node that serves the checkpoint of qwen2 alone: the reference."""
    with running(cluster_config(checkpoint("qwen2"), m(), cache={"num_blocks": 1024})) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def quiescent_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something going on in a shared cluster."""
    shared: list[Cluster] = [request.getfixturevalue(name) for name in _SHARED if name in request.fixturenames]
    yield
    for cluster in shared:
        cluster.wait_until_quiescent()
