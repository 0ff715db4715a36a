"""Two thousand requests of every kind in one cluster: a fixed probe never changes, and nothing grows."""

from __future__ import annotations

import gc
import types
from collections import Counter
from typing import Any

import pytest
from support.world import World

from kvrelay.machine.recent import Recent
from kvrelay.protocol.request import FinishReason

CHOOSES_PLANS_IN_FLIGHT = True

NUM_REQUESTS = 2000
PROBE_EVERY = 50
WARM = 1000
"""Requests after which everything that is bounded is full."""

SHARED = types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType | types.CodeType


def num_objects(root: object) -> int:
    """Return how many containers ``root`` reaches, without modules, classes and functions."""
    seen = {id(root)}
    found = [root]
    for item in found:
        for child in gc.get_referents(item):
            if id(child) not in seen and gc.is_tracked(child) and not isinstance(child, SHARED):
                seen.add(id(child))
                found.append(child)
    return len(found)


def sizes(world: World) -> Counter[str]:
    """Return how much each machine holds, at rest."""
    gc.collect()  # until then, tuples of plain values count as containers
    return Counter({process.peer: num_objects(process.machine) for process in world.processes.values()})


def submit_some(world: World, rest: dict[str, Any]) -> None:
    """Submit a request of a random kind; one in ten is aborted soon."""
    rng = world.rng
    prompt = world.prompt(rng.randrange(1, 60))
    if rng.random() < 0.3:
        prompt = (rest["shared"] + prompt)[:60]
    sampled: dict[str, Any] = {"temperature": 1.0, "num_logprobs": 2} if rng.random() < 0.3 else {}
    client = world.submit(prompt, rng.randrange(1, 30), priority=rng.randrange(-1, 2), **sampled)
    if rng.random() < 0.1:
        world.run_for(rng.random() * 0.02)
        if client.ended is None:
            world.abort(client)


@pytest.mark.fault("F26")
@pytest.mark.timeout(600)
def test_two_thousand_requests_change_no_probe_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recent.__init__, "__defaults__", (200,))  # what machines remember of the past is full soon
    storage = {"backend": "file", "min_read_tokens": 1, "write_policy": "on_finish", "resume": "auto"}
    with World(
        26,
        decode=2,
        cache={"num_blocks": 40},
        storage=storage,
        transfer={"link": "tcp"},
        engine={"max_plans_in_flight": 2},
    ) as world:
        probe = world.prompt(25)
        rest: dict[str, Any] = {"shared": world.prompt(20)}
        answers: list[list[int]] = []
        warm: Counter[str] = Counter()
        for number in range(NUM_REQUESTS):
            submit_some(world, rest)
            if number % PROBE_EVERY == 0:
                client = world.submit(probe, 20, seed=1, temperature=0.8)
                world.run_until(lambda client=client: client.ended)  # type: ignore[misc]
                assert client.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                answers.append(client.token_ids)
            elif number % 5 == 0:
                world.run_for(world.rng.random() * 0.05)
            if number == WARM:
                world.settle()
                warm = sizes(world)
            if len(world.clients) > 200:
                world.settle_clients()
                world.clients.clear()
        world.settle()
        assert len(answers) == NUM_REQUESTS // PROBE_EVERY
        assert all(answer == answers[0] for answer in answers)
        assert world.counted("preemptions", "d") > 0
        grown = {peer: (warm[peer], size) for peer, size in sizes(world).items() if size > 1.1 * warm[peer] + 30}
        assert grown == {}
