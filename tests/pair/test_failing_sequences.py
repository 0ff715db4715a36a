"""Sequences that fail in the engine, in clusters under load: one error each, and nobody else notices.

The fake engine fails a sequence in the step that computes a certain token, and spoils what that step writes for it.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.world import Client, World

BROKEN = 77
SHAPES: list[dict[str, int]] = [
    {"prefill": 1, "decode": 1},
    {"prefill": 2, "decode": 2},
    {"prefill": 0, "decode": 0, "mixed": 1},
    {"prefill": 1, "decode": 1, "mixed": 1},
]
ids = ["1p1d", "2p2d", "mixed", "both"]


def cluster(seed: int, shape: dict[str, Any], **options: Any) -> World:
    engine = {"eos_every": 0, "broken_token": BROKEN, **options.pop("engine", {})}
    return World(seed, **shape, engine=engine, careful=True, **options)


def wanted(client: Client) -> tuple[list[int], str | None]:
    """Return the tokens and the error of ``client`` in a run without faults."""
    if BROKEN in client.prompt:
        return [], "engine_error"
    if BROKEN in client.expected[:-1]:
        return client.expected[: client.expected.index(BROKEN) + 1], "engine_error"
    return client.expected, None


def load(world: World, count: int = 14, max_tokens: int = 24, **sampling: Any) -> list[Client]:
    """Submit prompts of all lengths, most with the same beginning; some have the broken token behind or within it."""
    rng, common = world.rng, without_broken(world, 18)
    for number in range(count):
        own = without_broken(world, rng.randint(1, 20))
        prompt = [*common, *own] if number % 3 else own
        if number % 3 == 1:
            prompt.insert(rng.randint(len(prompt) - len(own), len(prompt)), BROKEN)
        elif number % 7 == 2:
            prompt.insert(rng.randint(1, len(common)), BROKEN)
        world.submit(prompt, rng.randint(2, max_tokens), **(sampling if number % 2 else {}))
        if rng.random() < 0.5:
            world.run_for(rng.random() * 0.01)
    return list(world.clients.values())


def without_broken(world: World, length: int) -> list[int]:
    return [token if token != BROKEN else BROKEN + 1 for token in world.prompt(length)]


def assert_each_got_what_is_its_own(clients: list[Client]) -> None:
    assert [(client.token_ids, client.error) for client in clients] == [wanted(client) for client in clients]
    assert {error for _, error in map(wanted, clients)} == {None, "engine_error"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_some_fail_and_the_others_get_their_tokens(shape: dict[str, int], seed: int) -> None:
    with cluster(seed, shape) as world:
        clients = load(world, temperature=1.0, num_logprobs=2)
        world.settle(60.0)
        assert_each_got_what_is_its_own(clients)
        assert world.link.sent["RequestFailed"] == sum(client.error is not None for client in clients)
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.fault("F04")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_one_of_several_choices_fails_and_the_others_are_aborted(shape: dict[str, int], seed: int) -> None:
    """An answer without one of its choices is none: the router aborts the rest, wherever they are."""
    with cluster(seed, shape, scheduler={"max_num_batched_tokens": 16}) as world:
        prompt = without_broken(world, 20)
        place = world.rng.randrange(len(prompt))
        failing = [*prompt[:place], BROKEN, *prompt[place:]]
        choices = [world.submit(failing if number == 2 else prompt, 40, temperature=1.0) for number in range(5)]
        others = [world.submit(without_broken(world, 12), 12) for _ in range(2)]
        world.run_until(lambda: any(choice.error for choice in choices))
        for choice in choices:
            if choice.ended is None:
                world.abort(choice)
        world.settle(10.0)
        assert all((other.token_ids, other.error) == wanted(other) for other in others)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_an_error_says_what_is_the_matter_and_names_nobody(shape: dict[str, int]) -> None:
    with cluster(1, shape) as world:
        clients = load(world)
        world.settle(60.0)
        messages = [client.ended.error.message for client in clients if client.error]  # type: ignore[union-attr]
        assert all(message.startswith("the model's hidden states are not finite at position") for message in messages)
        assert not any(client.request_id in message for client in clients for message in messages)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_chunks_of_prompts_of_which_a_later_one_fails(shape: dict[str, int], seed: int) -> None:
    """What earlier chunks computed is shared, what the failing one did is not."""
    with cluster(seed, shape, scheduler={"max_num_batched_tokens": 9, "max_num_seqs": 8}) as world:
        clients = load(world)
        world.settle(60.0)
        assert_each_got_what_is_its_own(clients)


@pytest.mark.fault("F23")
@pytest.mark.parametrize("link", ["tcp", "auto"])
def test_kv_of_a_failing_step_that_has_arrived_is_shared_with_nobody(link: str) -> None:
    """All of it is on D, and said to be good, before D hears that the prompt has failed."""
    with cluster(0, SHAPES[0], transfer={"link": link}) as world:
        late = [world.link.delay(message, 0.1) for message in ("CloseTransfer", "CancelReservation", "Abort")]
        common = without_broken(world, 20)
        failing = world.submit([*common, BROKEN], 5)
        world.run_until_arrived("KVArrived")
        assert failing.error == "engine_error"
        for fault in late:
            world.link.faults.remove(fault)
        others = [world.submit([*common, number], 8) for number in range(100, 104)]
        world.settle(20.0)
        assert [(client.token_ids, client.error) for client in others] == [wanted(client) for client in others]


@pytest.mark.parametrize("method", ["naive", "ngram"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_guesses_change_nothing_about_who_fails_where(shape: dict[str, int], method: str) -> None:
    few = dict.fromkeys((40, 41, 42), 30.0)
    with cluster(2, shape, speculative={"method": method}) as world:
        clients = load(world, logit_bias=few)
        clients += [world.submit([40, 41, 42, 40, 41], 30, logit_bias={**few, BROKEN: 30.0}, seed=n) for n in range(6)]
        clients += [
            world.submit([40, 41, 42, 40, 41, n], 30, logit_bias={**few, BROKEN: 29.0}, seed=n, temperature=1.0)
            for n in range(6)
        ]
        world.settle(60.0)
        assert_each_got_what_is_its_own(clients)
        failed = [client for client in clients if client.error and client.token_ids]
        assert failed and all(client.token_ids[-1] == BROKEN for client in failed)
        if method == "ngram":
            assert sum(world.counted("accepted_draft_tokens", letter) for letter in "dm") > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("store", [None, {"backend": "file", "min_read_tokens": 1, "write_policy": "on_finish"}])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["1p1d", "mixed"])
def test_preempted_requests_fail_where_they_would_have(
    shape: dict[str, int], store: dict[str, Any] | None, seed: int
) -> None:
    scheduler = {"reserve_policy": "none", "watermark": 0.0}
    with cluster(seed, shape, cache={"num_blocks": 24}, scheduler=scheduler, storage=store) as world:
        clients = load(world, max_tokens=40)
        world.settle(120.0)
        assert_each_got_what_is_its_own(clients)
        assert sum(world.counted("preemptions", letter) for letter in "dm") > 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=ids[1:])
def test_some_fail_while_messages_are_lost_repeated_late_and_damaged(shape: dict[str, int], seed: int) -> None:
    """A request that fails in the engine never ends well; one that does not fails only for want of a network."""
    with cluster(
        seed,
        shape,
        cache={"num_blocks": 40},
        transfer={"link": "tcp" if seed % 2 else "auto"},
        speculative={"method": "ngram" if seed % 3 == 0 else "none"},
        limits={"request_timeout_s": 90.0, "max_attempts": 5},
    ) as world:
        world.link.disturb(drop=0.01, duplicate=0.03, overtake=0.03, delay=0.03, corrupt=0.01)
        clients = load(world)
        world.run_until(world.all_ended, 100.0)
        world.link.heal()
        world.settle(60.0)
        for client in clients:
            tokens, error = wanted(client)
            assert client.token_ids == tokens[: len(client.token_ids)]
            assert client.error is not None or error is None
            assert error is not None or client.error != "engine_error"
