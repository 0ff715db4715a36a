"""Requests of a real cluster are cancelled in several phases: both nodes give everything back, others go on."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.asking import Answer, Ask, Asker, answers, play, random_prompt
from support.cluster import PATIENCE_S, Cluster, running, until
from support.cluster_config import Config, cluster_config, d, fake_engine, p

pytestmark = pytest.mark.fault("F08")

NAME = "mine"
LONG = 150
"""Tokens of a prompt that takes P three seconds."""

ENDLESS = 2000
"""Output tokens that take D longer than tests wait for the cluster to be quiescent: a test fails if D goes on."""

CANCELLED = (410, "request_cancelled")

PHASES: dict[str, Callable[[Cluster], object]] = {
    "queued on P": lambda cluster: cluster.loads()["p0"]["num_waiting"],
    "computed on P": lambda cluster: cluster.loads()["p0"]["num_running"],
    "layers arrive on D": lambda cluster: cluster.loads()["d0"]["num_receiving"],
    "decoding": lambda cluster: cluster.loads()["d0"]["num_running"],
}
"""When a phase is there. The first needs a second prompt before it."""


def nodes() -> list[Config]:
    """Return a P with blocks for one prompt, which it computes in chunks, and a D with enough of them."""
    scheduler = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "prefill_order": "fifo"}
    return [p(cache={"num_blocks": 16}, scheduler=scheduler), d(cache={"num_blocks": 1024})]


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    engine = fake_engine(step_s=0.005, prefill_token_s=0.02, decode_token_s=0.08)
    with running(cluster_config(model, *nodes(), engine=engine)) as cluster:
        yield cluster


def by_http(cluster: Cluster, name: str) -> None:
    response = cluster.admin.delete(f"/cluster/requests/{name}")
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "cancelled"


def by_command(cluster: Cluster, name: str) -> None:
    command = [str(Path(sys.executable).with_name("kvrelay")), "cancel", name, "--url", str(cluster.admin.base_url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " cancelled, it was " in done.stdout


def ask_of(rng: random.Random, max_tokens: int = ENDLESS) -> Ask:
    return Ask(random_prompt(rng, LONG), max_tokens)


def cancelled_in(cluster: Cluster, phase: str, cancel: Callable[[Cluster, str], None]) -> Answer:
    """Return what the client of a request gets that is cancelled in ``phase``, while another is served."""
    rng = random.Random(phase)
    ask, other = ask_of(rng), ask_of(rng, 6)

    async def scenario(asker: Asker) -> Answer:
        before = [asyncio.create_task(asker.ask(other))] if phase == "queued on P" else []
        if before:
            await asyncio.to_thread(until, "P computes", lambda: PHASES["computed on P"](cluster))
        mine = asyncio.create_task(asker.ask(ask, **{"X-Request-Id": NAME}))
        await asyncio.to_thread(until, phase, lambda: PHASES[phase](cluster))
        after = [] if before else [asyncio.create_task(asker.ask(other))]
        await asyncio.to_thread(cancel, cluster, NAME)
        for answer in await asyncio.gather(*before, *after):
            assert answer.token_ids == other.expected(cluster.fake())
        return await mine

    return play(cluster, scenario)


@pytest.mark.parametrize("phase", PHASES)
def test_an_operator_cancels_a_request(cluster: Cluster, phase: str) -> None:
    aborted = cluster.status()["requests"]["aborted"]
    answer = cancelled_in(cluster, phase, by_http)
    assert answer.end == CANCELLED
    cluster.wait_until_quiescent()
    assert cluster.status()["requests"]["aborted"] == aborted + 1
    again = cluster.admin.delete(f"/cluster/requests/{NAME}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")


def test_the_command_cancels_a_request(cluster: Cluster) -> None:
    assert cancelled_in(cluster, "decoding", by_command).end == CANCELLED
    cluster.wait_until_quiescent()


@pytest.mark.parametrize("phase", list(PHASES)[1:])
def test_the_client_leaves(cluster: Cluster, phase: str) -> None:
    async def scenario(asker: Asker) -> None:
        mine = asyncio.create_task(asker.ask(ask_of(random.Random(phase))))
        await asyncio.to_thread(until, phase, lambda: PHASES[phase](cluster))
        mine.cancel()
        await asyncio.gather(mine, return_exceptions=True)

    play(cluster, scenario)
    cluster.wait_until_quiescent()


def test_every_choice_of_an_answer_is_cancelled_by_its_id(cluster: Cluster) -> None:
    body = {**ask_of(random.Random(1)).body, "prompt": [random_prompt(random.Random(2), 9)] * 2, "n": 2}

    async def scenario(asker: Asker) -> Answer:
        mine = asyncio.create_task(asker.post("/v1/completions", body, {"X-Request-Id": NAME}))
        await asyncio.to_thread(until, "all four decode", lambda: cluster.loads()["d0"]["num_running"] == 4)
        response = await asyncio.to_thread(cluster.admin.delete, f"/cluster/requests/cmpl-{NAME}")
        assert {item["request_id"] for item in response.json()["requests"]} == {f"cmpl-{NAME}-{i}" for i in range(4)}
        return await mine

    assert play(cluster, scenario).end == CANCELLED
    cluster.wait_until_quiescent()


def test_requests_end_at_their_deadline_in_whatever_phase_they_are(model: Path) -> None:
    """Three prompts at once: one is decoded, one is computed and one waits when five seconds are over."""
    engine = fake_engine(step_s=0.005, prefill_token_s=0.02, decode_token_s=0.02)
    config = cluster_config(model, *nodes(), router={"request_timeout_s": 5.0}, engine=engine)
    rng = random.Random(5)
    with running(config) as cluster:
        given = answers(cluster, [ask_of(rng) for _ in range(3)])
        assert [answer.end for answer in given] == [(503, "transfer_timeout")] * 3
        cluster.wait_until_quiescent()
        short = Ask(random_prompt(rng, 5), 5)
        (answer,) = answers(cluster, [short])
        assert answer.token_ids == short.expected(cluster.fake())
