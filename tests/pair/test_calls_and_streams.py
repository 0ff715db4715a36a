"""Tool calls on clusters in virtual time: valid whatever happens to a request, and the same in a stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from support.schemas import END, text_of
from support.tools import Answering, check_calls, drawn_request, model_of, without_ids
from support.world import Client, World
from test_resuming import STORE, counted, preempt_often

from kvrelay.protocol.request import FinishReason
from router.openai.output_grammar import chat_structure
from router.openai.schemas import ChatCompletionRequest

MAX_TOKENS = 3000
ROOM = {"block_size": 16, "num_blocks": 1200}
FAMILIES = ("hermes", "llama3", "mistral", "pythonic", None)


class Turn(NamedTuple):
    request: ChatCompletionRequest
    answering: Answering
    client: Client


def submit(world: World, seed: int) -> Turn:
    request, model = drawn_request(seed), model_of(FAMILIES[seed % len(FAMILIES)])
    structure = chat_structure(request, model, [65])
    assert structure is not None
    drawn: dict[str, Any] = {"temperature": 1.0} if seed % 2 else {}
    client = world.submit(5 + seed % 20, MAX_TOKENS, eos_token_ids=[END], grammar=structure.grammar, **drawn)
    return Turn(request, Answering(model, request), client)


def check(turns: dict[int, Turn]) -> None:
    """Fail unless each answer has valid calls, and a stream says the same however its tokens come."""
    for seed, (request, answering, client) in turns.items():
        text = text_of(client.token_ids)
        assert client.finish_reason is FinishReason.STOP, f"request {seed}: {client.ended} {text}"
        whole = answering.whole(client.token_ids, client.finish_reason)
        check_calls(request, whole)
        for steps in ([[token] for token in client.token_ids], cut(client.token_ids, seed)):
            streamed = answering.streamed(steps, client.finish_reason)
            assert without_ids(streamed["message"]) == without_ids(whole["message"])
            assert streamed["finish_reason"] == whole["finish_reason"]


def cut(token_ids: Sequence[int], seed: int) -> list[Sequence[int]]:
    """Return the tokens in steps of several."""
    rng, steps, done = random.Random(seed), [], 0
    while done < len(token_ids):
        count = rng.randint(1, 9)
        steps.append(token_ids[done : done + count])
        done += count
    return steps


def test_fifty_requests() -> None:
    with World(1, cache=ROOM) as world:
        for first in range(0, 50, 10):
            turns = {seed: submit(world, seed) for seed in range(first, first + 10)}
            world.settle_clients()
            check(turns)


@pytest.mark.fault("F10")
def test_preempted_every_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_often(monkeypatch)
    with World(2, cache=ROOM, storage=STORE) as world:
        turns = {seed: submit(world, seed) for seed in range(50, 60)}
        world.settle_clients()
        check(turns)
        assert counted(world, "preemptions") >= 30


def test_drafts_change_nothing() -> None:
    with World(3, cache=ROOM, speculative={"method": "ngram", "num_speculative_tokens": 3}) as world:
        turns = {seed: submit(world, seed) for seed in range(60, 75)}
        world.settle_clients()
        check(turns)
        assert counted(world, "accepted_draft_tokens") > 50


def test_the_decode_node_dies_in_mid_stream() -> None:
    with World(4, decode=2, cache=ROOM) as world:
        turns = {seed: submit(world, seed) for seed in range(80, 90)}
        running = [turn.client for turn in turns.values() if turn.client.nodes[-1] == "d0"]
        world.run_until(lambda: sum(len(client.token_ids) > 3 for client in running) > 2)
        world.kill("d0")
        world.settle_clients()
        check(turns)
