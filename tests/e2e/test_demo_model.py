"""The demo model's answers are right, and the same however they are computed; spoilt KV shows in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_model.questions import Question, questions
from support.asking import Answer, Asker, at_once, play
from support.cluster import Cluster, running
from support.cluster_config import Config, cluster_config, d, m, p

from kvrelay.engine.geometry import node_geometry
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.kv_pool.shared_file import TAG_BYTES
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.kv_handle import KVMemoryHandle

MODEL = Path(__file__).parents[2] / "models" / "demo"
HELD_OUT = 20_000
"""Seed of the questions; training draws its chats from other generators and seeds."""

LENGTHS = (200, 500, 1000, 2000)
QUESTIONS = [question for length in LENGTHS for question in questions(HELD_OUT + length, 50, length)]
BAR = 0.98
AT_ONCE = 16
IN_A_ROW = 50
"""Questions asked at most before the client has a rest: a busy machine needs its time for each."""

MAX_TOKENS = 64

NUM_AGAIN = 40
"""Questions that are asked a second time: as many as the pools keep the KV of."""

SHORT = questions(HELD_OUT + 2, 200, 300)
TIGHT = 40
"""Blocks of a decode node that has room for two or three of SHORT."""

MAX_ROUNDS = 5
"""How often SHORT is asked: which requests meet on a node, and are in each other's way, is up to the machine's pace."""

NUM_INT8 = 60
INT8_BAR = 0.9

CHUNK = 128
NUM_SPOILT = 4
"""Chats whose blocks are emptied one after the other."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def alone() -> Iterator[Cluster]:
    """One mixed node: the reference."""
    yield from _running(m())


@pytest.fixture(scope="module")
def reference(alone: Cluster) -> list[str]:
    """What the reference answers to QUESTIONS, which it had not heard before."""
    return said(alone, QUESTIONS)


@pytest.fixture(scope="module")
def one_prefill_three_decode() -> Iterator[Cluster]:
    yield from _running(p(), *(d(f"d{index}") for index in range(3)))


@pytest.fixture(scope="module")
def in_chunks() -> Iterator[Cluster]:
    """1P1D that computes prompts in small chunks and keeps nothing of them."""
    yield from _running(
        p(), d(), cache={"prefix_caching": False}, scheduler={"max_num_batched_tokens": CHUNK, "max_num_seqs": 32}
    )


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """1P1D with small pools that are still empty."""
    yield from _running(p(), d(), cache={"num_blocks": 256})


def _running(*nodes: Config, **sections: Any) -> Iterator[Cluster]:
    sections["cache"] = {"num_blocks": 4096, **sections.get("cache", {})}
    with running(cluster_config(MODEL, *nodes, **sections)) as cluster:
        yield cluster
        cluster.wait_until_quiescent()


def said(cluster: Cluster, asked: list[Question]) -> list[str]:
    """Return the answers to ``asked``, AT_ONCE at once."""
    bodies = [{"model": "demo", "messages": question.messages, "max_tokens": MAX_TOKENS} for question in asked]

    async def scenario(part: list[dict[str, Any]], asker: Asker) -> list[Answer]:
        return await at_once(AT_ONCE, [partial(asker.post, "/v1/chat/completions", body) for body in part])

    parts = [bodies[first : first + IN_A_ROW] for first in range(0, len(bodies), IN_A_ROW)]
    given = [answer for part in parts for answer in play(cluster, partial(scenario, part))]
    assert all(answer.end is None for answer in given)
    return [answer.body["choices"][0]["message"]["content"] for answer in given]


def share_right(answers: list[str], asked: list[Question]) -> float:
    return sum(answer == question.answer for answer, question in zip(answers, asked, strict=True)) / len(asked)


def test_one_node_answers_right(reference: list[str]) -> None:
    assert share_right(reference, QUESTIONS) >= BAR


@pytest.mark.parametrize("quantization", ["w8a8", "w8a16"])
def test_weights_in_int8_answer_right_and_the_same_on_a_pair(quantization: str) -> None:
    """Both clusters compute alike, and rounding weights costs next to no answer."""
    found = []
    for nodes in ([m()], [p(), d()]):
        for cluster in _running(*nodes, engine={"quantization": quantization}):
            found.append(said(cluster, SHORT[:NUM_INT8]))
    assert found[0] == found[1]
    assert share_right(found[0], SHORT[:NUM_INT8]) >= INT8_BAR


def test_weights_in_float8_answer_right_on_a_pair_of_torch_engines() -> None:
    pytest.importorskip("torch", reason="kvrelay[torch] is not installed")
    asked = SHORT[:NUM_INT8]
    for cluster in _running(p(), d(), engine={"kind": "torch", "quantization": "fp8"}):
        assert share_right(said(cluster, asked), asked) >= INT8_BAR
        assert cluster.status()["requests"]["kv_bytes_moved"] > 0


def test_one_prefill_and_three_decode_nodes_answer_the_same(
    one_prefill_three_decode: Cluster, reference: list[str]
) -> None:
    answers = said(one_prefill_three_decode, QUESTIONS)
    assert share_right(answers, QUESTIONS) >= BAR
    assert answers == reference
    assert one_prefill_three_decode.status()["requests"]["kv_bytes_moved"] > 0


def test_prompts_in_chunks_are_answered_the_same(in_chunks: Cluster, reference: list[str]) -> None:
    assert said(in_chunks, QUESTIONS) == reference
    in_chunks.wait_until_quiescent()
    assert in_chunks.counters()["prefix_hit_tokens"] == 0


def test_what_is_in_the_prefix_cache_is_answered_the_same(
    alone: Cluster, one_prefill_three_decode: Cluster, reference: list[str]
) -> None:
    again = QUESTIONS[-NUM_AGAIN:]
    for cluster in (alone, one_prefill_three_decode):
        said(cluster, again)
        cluster.wait_until_quiescent()
        before = cluster.counters()["prefix_hit_tokens"]
        assert said(cluster, again) == reference[-NUM_AGAIN:]
        cluster.wait_until_quiescent()
        assert cluster.counters()["prefix_hit_tokens"] > before


def test_preempted_requests_resume_from_storage_and_are_answered_the_same(alone: Cluster, tmp_path: Path) -> None:
    """Decode nodes that admit whatever fits at first preempt when answers grow; files keep what was computed."""
    nodes = [p(cache={"num_blocks": 1024}), *(d(f"d{index}", cache={"num_blocks": TIGHT}) for index in range(3))]
    store = {"backend": "file", "path": str(tmp_path / "kv"), "capacity": "256MiB", "resume": "storage"}
    config = cluster_config(
        MODEL,
        *nodes,
        storage={**store, "min_read_tokens": 16},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
    )
    expected = said(alone, SHORT)
    assert share_right(expected, SHORT) >= BAR
    with running(config) as cluster:
        counted = dict.fromkeys(("preemptions", "kv_blocks_saved", "kv_blocks_loaded"), 0)
        for _ in range(MAX_ROUNDS):
            if all(counted.values()):
                break
            assert said(cluster, SHORT) == expected
            cluster.wait_until_quiescent()
            counters = [cluster.loads()[f"d{index}"]["counters"] for index in range(3)]
            counted = {name: sum(of_node[name] for of_node in counters) for name in counted}
    assert all(counted.values()), counted


def test_the_demo_prints_a_right_answer() -> None:
    command = [sys.executable, "-P", "-m", "kvrelay.cluster.demo", "--exit"]
    shown = subprocess.run(command, check=False, cwd=MODEL.parents[1], capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "\nThe red key is in drawer 86.\n" in shown.stdout


# ------------------------------------------------------------ the detector


def test_one_block_that_never_arrived_shows(pair: Cluster) -> None:
    """D keeps the KV of a chat; when a block of it is empty that says what is asked for, D answers wrongly."""
    asked = questions(HELD_OUT + 1, NUM_SPOILT, 300, tasks=("recall",))
    num_noticed = 0
    with closing(pool(pair, "d0")) as memory:
        for question in asked:
            before = memory.planes.copy()
            assert said(pair, [question]) == [question.answer]
            pair.wait_until_quiescent()
            written = [int(block) for block in np.flatnonzero((memory.planes != before).any(axis=(0, 1, 3)))]
            answers = [said_without(pair, memory, block, question) for block in written]
            num_noticed += any(answer != question.answer for answer in answers)
            assert said(pair, [question]) == [question.answer]  # with all blocks as they were
    assert num_noticed == len(asked)


def said_without(cluster: Cluster, memory: KVMemory, block: int, question: Question) -> str:
    """Return the answer to ``question`` while ``block`` is empty."""
    kept = memory.planes[:, :, block].copy()
    memory.planes[:, :, block] = 0
    (answer,) = said(cluster, [question])
    cluster.wait_until_quiescent()
    memory.planes[:, :, block] = kept
    return answer


def pool(cluster: Cluster, node: str) -> KVMemory:
    """Map the memory of a node's KV pool, as its messager does."""
    geometry = geometry_of(cluster, node)
    pid = cluster.pid(node)
    for path in Path(f"/proc/{pid}/fd").iterdir():
        is_pool = False
        with suppress(FileNotFoundError):  # it has been closed since it was listed
            is_pool = "memfd:kvrelay-kv" in str(path.readlink())
        if is_pool:
            content = path.read_bytes()
            num_blocks = (len(content) - TAG_BYTES) // geometry.block_bytes
            return KVMemory.attach(
                geometry, KVMemoryHandle(pid, int(path.name), content[-TAG_BYTES:].decode(), num_blocks)
            )
    raise AssertionError(f"{node} has no KV memory")


def geometry_of(cluster: Cluster, node: str) -> KVGeometry:
    return node_geometry(cluster.config.node(node), lambda _read, _size: None)
