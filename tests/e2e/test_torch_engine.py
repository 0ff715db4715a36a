"""Clusters of device engines on a CPU, and of two kinds, against what transformers gives for the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden.cases import CASES, NUM_OUTPUT_TOKENS, load_golden
from support.asking import Ask, answers
from support.cluster import Cluster, running
from support.cluster_config import cluster_config, d, p
from support.cluster_fixtures import WriteCheckpoint

pytest.importorskip("torch", reason="kvrelay[torch] is not installed")

TORCH = {"engine": {"kind": "torch"}}
ON_DEVICE: dict[str, Any] = {**TORCH, "transfer": {"link": "cuda"}}
PADDLE_ON_DEVICE = {"engine": {"kind": "paddle-device"}, "transfer": {"link": "cuda"}}
PADDLE = {"engine": {"kind": "paddle", "kernels": "portable"}}

CLUSTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch": (TORCH, TORCH),
    "torch_on_simulated_devices": (ON_DEVICE, ON_DEVICE),
    "paddle_to_torch": (PADDLE, TORCH),
    "torch_to_paddle": (TORCH, PADDLE),
    "paddle_on_simulated_devices": (PADDLE_ON_DEVICE, PADDLE_ON_DEVICE),
    "torch_to_paddle_on_simulated_devices": (ON_DEVICE, PADDLE_ON_DEVICE),
}
"""Sections of the prefill node and of the decode node."""


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest, checkpoint: WriteCheckpoint) -> Iterator[Cluster]:
    of_p, of_d = CLUSTERS[request.param]
    nodes = p(**of_p), d(**of_d)
    sections: dict[str, Any] = {"cache": {"num_blocks": 512}, "scheduler": {"max_num_seqs": 8}}
    with running(cluster_config(checkpoint("qwen3"), *nodes, model={"dtype": "float32"}, **sections)) as running_one:
        yield running_one
        running_one.wait_until_quiescent()
        links_cuda = running_one.loads()["p0"]["counters"].get("links_cuda", 0.0)
        assert links_cuda == float("transfer" in of_p)


def test_tokens_are_those_of_transformers(cluster: Cluster) -> None:
    golden = list(load_golden(next(case for case in CASES if case.name == "qwen3")))[:5]

    given = answers(cluster, [Ask(one.prompt_token_ids, NUM_OUTPUT_TOKENS) for one in golden])

    assert [answer.token_ids for answer in given] == [one.output_token_ids for one in golden]


NO_PADDLE = """
import sys

class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "paddle":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
"""


def test_no_process_imports_paddle(
    checkpoint: WriteCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_PADDLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    golden = list(load_golden(next(case for case in CASES if case.name == "qwen3")))[:2]
    nodes = p(**ON_DEVICE), d(**ON_DEVICE)
    sections: dict[str, Any] = {"cache": {"num_blocks": 64}, "scheduler": {"max_num_seqs": 4}}

    with running(cluster_config(checkpoint("qwen3"), *nodes, model={"dtype": "float32"}, **sections)) as cluster:
        given = answers(cluster, [Ask(one.prompt_token_ids, NUM_OUTPUT_TOKENS) for one in golden])
        cluster.wait_until_quiescent()

    assert [answer.token_ids for answer in given] == [one.output_token_ids for one in golden]
