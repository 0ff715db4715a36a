"""Logprobs of prompts on clusters in virtual time: bit for bit those of a prompt that is computed at once, each once.

``World`` compares what every client got with the reference.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.world import Client, World
from test_prompts_on_decode_nodes import burst, lending
from test_resuming import STORE, counted, preempt_often

from kvrelay.engine import prompt_logprobs
from kvrelay.protocol.request import FinishReason

DISAGGREGATED: dict[str, Any] = {"prefill": 1, "decode": 1}
MIXED: dict[str, Any] = {"prefill": 0, "decode": 0, "mixed": 1}
SHAPES: list[dict[str, Any]] = [DISAGGREGATED, MIXED]
LENGTHS = (1, 2, 3, 4, 5, 16, 17, 33, 70)


def submit(world: World, prompt: int | list[int], max_tokens: int = 6, alternatives: int = 2, **params: Any) -> Client:
    return world.submit(prompt, max_tokens, num_prompt_logprobs=alternatives, **params)


def num_scored(client: Client) -> int:
    return sum(len(piece.ranks) // 4 for piece in client.prompt_logprobs)


@pytest.mark.parametrize("budget", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks(shape: dict[str, Any], budget: int) -> None:
    scheduler = {"max_num_batched_tokens": budget}
    with World(**shape, scheduler=scheduler, cache={"num_blocks": 200}) as world:
        clients = [submit(world, length, alternatives=length % 4) for length in LENGTHS]
        others = [world.submit(length, 4) for length in LENGTHS]
        world.serve_all()
    assert [num_scored(client) for client in clients] == [length - 1 for length in LENGTHS]
    assert not any(client.prompt_logprobs for client in others)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_is_generated_if_only_the_prompt_is_wanted(shape: dict[str, Any]) -> None:
    with World(**shape) as world:
        clients = [submit(world, length, max_tokens=0) for length in LENGTHS]
        world.serve_all()
    assert all(client.finish_reason is FinishReason.LENGTH and not client.token_ids for client in clients)
    assert world.counted("first_tokens", "p") + world.counted("decode_tokens", "m") == 0
    assert world.link.sent["ReserveBlocks"] == 0


@pytest.mark.parametrize("storage", [{}, STORE])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_prompts_are_computed_again(shape: dict[str, Any], storage: dict[str, Any]) -> None:
    """A prefix cache and a store have KV and no logprobs. D's hits still need no transfer."""
    with World(**shape, storage=storage) as world:
        prompt = world.prompt(41)
        for _ in range(3):
            world.submit(prompt, 6)
            world.serve_all()
        moved = world.counted("kv_bytes_received", "d")
        again = [submit(world, prompt), submit(world, prompt[:30]), submit(world, prompt, max_tokens=0)]
        world.serve_all()
        assert all(client.num_cached_tokens == 0 for client in again)
        later = world.submit(prompt, 6)
        world.serve_all()
        assert later.num_cached_tokens == 40
        world.run_for(1.5)
        block_bytes = next(iter(world.nodes.values())).engine.geometry.block_bytes  # the last, cut one of each
        assert world.counted("kv_bytes_received", "d") - moved <= 3 * block_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_prompts_at_once_wait_for_no_block(shape: dict[str, Any]) -> None:
    with World(**shape, careful=True, cache={"num_blocks": 200}) as world:
        prompt = world.prompt(45)
        for number in range(6):
            submit(world, prompt) if number % 2 else world.submit(prompt, 6)
        world.serve_all()


def test_resumed_requests_compute_no_logprobs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    both: list[dict[str, Any]] = [{}, {"storage": STORE}]
    for options in both:
        for shape in SHAPES:
            with World(3, **shape, **options) as world:
                clients = [submit(world, length, 20, ignore_eos=True) for length in LENGTHS]
                world.serve_all()
                assert counted(world, "preemptions") > 5
            assert [num_scored(client) for client in clients] == [length - 1 for length in LENGTHS]


def test_moved_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with World(5, decode=2, nodes={"d0": {"cache": {"block_size": 4, "num_blocks": 30}}}) as world:
        for _ in range(8):
            submit(world, 20, 20, ignore_eos=True)
        world.serve_all()
        assert world.router.machine.requests.counters.moved > 0


@pytest.mark.parametrize("budget", [8, 64])
@pytest.mark.parametrize("nth", [1, 3])
def test_the_node_dies_after_a_part_of_the_logprobs(nth: int, budget: int) -> None:
    """Another node begins again; the client gets each position once."""
    with World(6, prefill=2, scheduler={"max_num_batched_tokens": budget}) as world:
        clients = [submit(world, 40 + number) for number in range(4)]
        world.run_until_arrived("PromptLogprobsOut", nth)
        assert any(num_scored(client) > 0 for client in clients)
        world.kill("p0")
        world.serve_all()


def test_a_mixed_node_dies() -> None:
    with World(7, prefill=0, decode=0, mixed=2, scheduler={"max_num_batched_tokens": 8}) as world:
        for number in range(4):
            submit(world, 40 + number, 10, ignore_eos=True)
        world.run_until_arrived("PromptLogprobsOut", 7)
        world.kill("m0")
        world.serve_all()


def test_the_decode_node_dies_after_the_first_token() -> None:
    with World(8, decode=2) as world:
        client = submit(world, 40, 20, ignore_eos=True)
        world.run_until(lambda: len(client.token_ids) > 3)
        computed = world.counted("prefill_tokens", "p")
        world.kill(client.nodes[-1])
        world.serve_all()
        world.run_for(1.5)
        assert world.counted("prefill_tokens", "p") - computed < 20, "the cache serves the second attempt"


def test_decode_nodes_compute_prompts() -> None:
    with lending() as world:
        burst(world, num_prompt_logprobs=1)
        world.serve_all()


@pytest.mark.parametrize("seed", range(8))
def test_nodes_die_and_clients_leave(seed: int) -> None:
    with World(seed, prefill=2, decode=2, scheduler={"max_num_batched_tokens": 16}) as world:
        clients = [submit(world, world.rng.randrange(1, 60), world.rng.randrange(8)) for _ in range(12)]
        world.run_for(world.rng.random() * 0.05)
        world.abort(clients[0])
        world.kill(world.rng.choice(["p0", "d0"]))
        world.run_for(world.rng.random() * 0.05)
        world.settle_clients()


def test_pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_ENTRIES", 12)
    with World() as world:
        client = submit(world, 50, alternatives=3)
        world.serve_all()
    assert [len(piece.ranks) // 4 for piece in client.prompt_logprobs] == [3] * 16 + [1]


def test_a_token_before_the_logprobs_fails_the_attempt() -> None:
    """Should messages be lost, nothing is missing in an answer."""
    with World() as world:
        requests = world.router.machine.requests
        take = requests.take_prompt_logprobs
        dropped: list[object] = []

        def drop_first(peer: Any, message: Any) -> None:
            if dropped:
                take(peer, message)
            dropped.append(message)

        requests.take_prompt_logprobs = drop_first  # type: ignore[method-assign]
        submit(world, 20)
        world.serve_all()
        assert len(dropped) == 2 and requests.counters.retries == 1
