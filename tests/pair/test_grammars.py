"""Structured output on clusters in virtual time: whatever happens to a request, its answer is valid and the same.

The grammar's state is made of the output tokens, so a node that gets a request with some of them goes on where another
stopped.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.schemas import END, drawn_schema, is_valid, json_schema, text_of
from support.world import Client, World
from test_resuming import STORE, counted, preempt_often

from kvrelay.protocol.request import FinishReason, Grammar, GrammarKind

MAX_TOKENS = 700
ROOM = {"block_size": 16, "num_blocks": 400}


def submit(world: World, seed: int, **sampling: Any) -> Client:
    """Ask for a value of a drawn schema, greedy or sampled."""
    drawn = {"temperature": 1.0} if seed % 2 else {}
    return world.submit(
        5 + seed % 20,
        max_tokens=MAX_TOKENS,
        eos_token_ids=[END],
        grammar=json_schema(drawn_schema(seed)),
        **{**drawn, **sampling},
    )


def check_answers(clients: dict[int, Client]) -> None:
    for seed, client in clients.items():
        assert client.finish_reason is FinishReason.STOP, f"schema {seed}: {client.ended} {text_of(client.token_ids)}"
        assert is_valid(drawn_schema(seed), client.token_ids), f"schema {seed}: {text_of(client.token_ids)}"


def serve(world: World, seeds: range, **sampling: Any) -> None:
    clients = {seed: submit(world, seed, **sampling) for seed in seeds}
    world.settle_clients()
    check_answers(clients)


@pytest.mark.parametrize("role", ["decode", "mixed"])
def test_a_hundred_schemas(role: str) -> None:
    sizes: dict[str, Any] = {"prefill": 1, "decode": 1} if role == "decode" else {"prefill": 0, "decode": 0, "mixed": 1}
    with World(1, cache=ROOM, **sizes) as world:
        for first in range(0, 100, 20):
            serve(world, range(first, first + 20))


@pytest.mark.fault("F10")
def test_preempted_every_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with World(2, cache=ROOM, storage=STORE) as world:
        serve(world, range(100, 112), num_logprobs=2)
        assert counted(world, "preemptions") >= 30


def test_drafts_change_nothing() -> None:
    with World(3, cache=ROOM, speculative={"method": "ngram", "num_speculative_tokens": 3}) as world:
        serve(world, range(30))
        assert counted(world, "accepted_draft_tokens") > 100


def test_the_decode_node_dies_in_mid_stream() -> None:
    with World(4, decode=2, cache=ROOM) as world:
        clients = {seed: submit(world, seed) for seed in range(20)}
        running = [client for client in clients.values() if client.nodes[-1] == "d0"]
        world.run_until(lambda: sum(len(client.token_ids) > 3 for client in running) > 3)
        world.kill("d0")
        world.settle_clients()
        check_answers(clients)


def test_a_preempted_request_goes_on_on_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with World(5, decode=2, cache=ROOM, nodes={"d0": {"cache": {"block_size": 16, "num_blocks": 60}}}) as world:
        serve(world, range(40, 60))
        assert world.router.machine.requests.counters.moved > 0


def test_each_of_several_choices_is_valid() -> None:
    with World(6, cache=ROOM) as world:
        prompt, schema = world.prompt(9), drawn_schema(7)
        clients = [
            world.submit(
                prompt, MAX_TOKENS, seed=seed, temperature=1.0, eos_token_ids=[END], grammar=json_schema(schema)
            )
            for seed in range(8)
        ]
        world.settle_clients()
        assert all(is_valid(schema, client.token_ids) for client in clients)
        assert len({text_of(client.token_ids) for client in clients}) > 1


def test_an_answer_that_is_too_long_is_cut() -> None:
    with World(7, cache=ROOM) as world:
        grammar = json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 50})
        client = world.submit(5, 20, eos_token_ids=[END], grammar=grammar)
        world.settle_clients()
        assert client.finish_reason is FinishReason.LENGTH
        assert len(client.token_ids) == 20


def test_a_grammar_that_cannot_be_satisfied_fails_its_request_and_no_other() -> None:
    with World(8, cache=ROOM) as world:
        broken = world.submit(5, 20, eos_token_ids=[END], grammar=Grammar(GrammarKind.REGEX, "("))
        clients = {seed: submit(world, seed) for seed in range(3)}
        world.settle_clients()
        assert broken.error == "engine_error"
        check_answers(clients)
