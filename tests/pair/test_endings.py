"""A client leaves, a node dies, at each boundary of a request's life: everything is given back, no token is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from support.processes import Process
from support.world import Client, World

from decode_node.request import DecodeStatus
from kvrelay.config.cluster_config import Role
from kvrelay.protocol.request import FinishReason

LIFE = [
    "Prefill",
    "ReserveBlocks",
    "ExpectKV",
    "KVExpected",
    "BlocksReserved",
    "OpenTransfer",
    "LinkHello",
    "LinkAccepted",
    "LayerSignal",
    "KVFrame",
    "FrameAck",
    "TokensOut",
    "HandOff",
    "KVArrived",
    "TransferDone",
    "RequestTimeline",
]
"""Every message of a clean request in about the order in which they come."""

MOMENTS = [(message, arrived) for message in LIFE for arrived in (False, True)]

PROMPT_LEN, MAX_TOKENS = 27, 9

SILENT = ("not heard for", "no heartbeat")
"""Why a process gives up another that it has not heard."""


def begun(world: World, message: str, arrived: bool) -> Client:
    """Submit a request and stop at the moment ``message`` is on its way, or has been handled."""
    counted = world.link.arrived if arrived else world.link.sent
    before = counted[message]
    client = world.submit(PROMPT_LEN, MAX_TOKENS)
    world.run_until(lambda: counted[message] > before)
    return client


@pytest.mark.fault("F08")
@pytest.mark.parametrize(("message", "arrived"), MOMENTS)
def test_client_leaves(message: str, arrived: bool) -> None:
    """Both legs are cancelled at once, without waiting for a lease or a timeout."""
    with World(scheduler={"max_num_batched_tokens": 8}, engine={"eos_every": 0}) as world:
        client = begun(world, message, arrived)
        world.abort(client)
        world.settle(1.0)
        assert client.finish_reason is FinishReason.ABORT
        # Nothing of it is in anybody's way.
        other = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.settle(1.0)
        assert other.finish_reason is FinishReason.LENGTH


@pytest.mark.fault("F08")
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_client_leaves_while_decoding(nth: int) -> None:
    with World(engine={"eos_every": 0}) as world:
        client = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.run_until_arrived("TokensOut", nth)
        world.abort(client)
        world.settle(1.0)
        assert client.finish_reason is FinishReason.ABORT
        assert nth <= len(client.token_ids) <= nth + 1


@pytest.mark.fault("F08")
def test_client_leaves_a_mixed_node_at_any_step() -> None:
    for seconds in range(12):
        with World(prefill=0, decode=0, mixed=1, scheduler={"max_num_batched_tokens": 8}) as world:
            client = world.submit(PROMPT_LEN, MAX_TOKENS)
            other = world.submit(PROMPT_LEN, MAX_TOKENS)
            world.run_for(0.0013 * seconds)
            world.abort(client)
            world.settle(1.0)
            assert other.error is None


@pytest.mark.fault("F01")
def test_blocks_of_a_client_that_left_are_not_given_away_while_they_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P still sends into D's blocks when the client leaves; pools are so small that the next one gets the same."""
    for seed in range(12):
        with World(
            seed,
            cache={"num_blocks": 9, "prefix_caching": False},
            transfer={"link": "tcp" if seed % 2 else "shm", "checksum": seed % 3 > 0},
            careful=True,
        ) as world:
            client = world.submit(PROMPT_LEN, MAX_TOKENS)
            world.link.delay("KVFrame", 0.004)
            world.run_until_sent("KVFrame", 1 + seed % 2)
            world.abort(client)
            follower = world.submit(PROMPT_LEN, MAX_TOKENS)
            world.settle(10.0)
            assert follower.error is None


# ---------------------------------------------------------------- deaths


@pytest.mark.fault("F13")
@pytest.mark.parametrize("victim", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize(("message", "arrived"), MOMENTS)
def test_a_node_dies(message: str, arrived: bool, victim: int) -> None:
    """The other nodes finish the request, with the tokens of a clean run; nobody keeps anything of it."""
    with World(prefill=2, decode=2, scheduler={"max_num_batched_tokens": 8}, engine={"eos_every": 0}) as world:
        client = begun(world, message, arrived)
        world.kill(client.nodes[victim])
        world.settle(30.0)
        assert client.finish_reason is FinishReason.LENGTH


@pytest.mark.fault("F13")
@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize(("message", "arrived"), MOMENTS[::3])
def test_the_only_node_of_its_role_dies_and_comes_back(message: str, arrived: bool, victim: str) -> None:
    """At the same address or at another, at once or after it was missed."""
    for port in (None, 9999):
        with World(scheduler={"max_num_batched_tokens": 8}, engine={"eos_every": 0}) as world:
            client = begun(world, message, arrived)
            world.restart(victim, port)
            world.settle(60.0)
            assert client.finish_reason is FinishReason.LENGTH
    with World(scheduler={"max_num_batched_tokens": 8}, engine={"eos_every": 0}) as world:
        client = begun(world, message, arrived)
        world.kill(victim)
        world.run_for(8.0)
        world.start(victim, Role.PREFILL if victim == "p0" else Role.DECODE)
        world.settle(60.0)
        assert client.finish_reason is FinishReason.LENGTH


def test_decode_node_dies_while_decoding_and_another_goes_on() -> None:
    for nth in (2, 4, 7):
        with World(decode=2, engine={"eos_every": 0}) as world:
            client = world.submit(PROMPT_LEN, MAX_TOKENS, temperature=1.0)
            world.run_until_arrived("TokensOut", nth)
            world.kill(client.nodes[1])
            world.settle(30.0)
            assert client.finish_reason is FinishReason.LENGTH


def test_mixed_node_dies_and_another_goes_on() -> None:
    for nth in (1, 4, 7):
        with World(prefill=0, decode=0, mixed=2, engine={"eos_every": 0}) as world:
            client = world.submit(PROMPT_LEN, MAX_TOKENS, temperature=1.0)
            world.run_until_arrived("TokensOut", nth)
            world.kill(client.nodes[0])
            world.settle(30.0)
            assert client.finish_reason is FinishReason.LENGTH


def test_everybody_dies_and_the_client_gets_an_error() -> None:
    with World() as world:
        client = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.run_until_sent("KVFrame")
        world.kill("p0")
        world.kill("d0")
        world.settle(90.0)
        assert client.error == "no_node_available"


@pytest.mark.parametrize("which", [0, 1], ids=["prefill", "decode"])
def test_a_messager_dies_and_its_node_with_it(which: int) -> None:
    with World(prefill=2, decode=2, engine={"eos_every": 0}) as world:
        client = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.run_until_sent("KVFrame")
        node = world.nodes[client.nodes[which]]
        assert node.messager is not None
        node.messager.exit("killed")
        world.settle(30.0)
        assert node.exit_reason == "messager lost"
        assert client.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_device_is_lost_and_its_node_leaves(name: str, step: int) -> None:
    with World(prefill=2, decode=2, engine={"eos_every": 0}) as world:
        node = world.nodes[name]
        node.device_lost_in = step
        clients = [world.submit(PROMPT_LEN, MAX_TOKENS, temperature=1.0) for _ in range(12)]
        world.settle(30.0)
        assert node.exit_reason == "device lost"
        assert {client.finish_reason for client in clients} == {FinishReason.LENGTH}


@pytest.mark.fault("F02")
def test_abort_and_then_the_prefill_node_dies() -> None:
    """D's blocks come back although nobody is left to say that the reservation is over."""
    with World(engine={"eos_every": 0}) as world:
        client = begun(world, "BlocksReserved", arrived=True)
        world.link.drop("Abort")
        world.link.drop("CancelReservation")
        world.abort(client)
        world.kill("p0")
        assert world.nodes["d0"].machine.kv.num_used > 0
        world.settle(10.0)
        assert world.nodes["d0"].machine.kv.num_used == 0


@pytest.mark.fault("F09")
@pytest.mark.parametrize("which", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("seconds", [2.0, 20.0])
def test_a_node_is_stopped_and_goes_on(which: int, seconds: float) -> None:
    """SIGSTOP, shorter and longer than the peer timeout. What it then says of old attempts is ignored."""
    with World(prefill=2, decode=2, engine={"eos_every": 0}) as world:
        client = begun(world, "LayerSignal", arrived=False)
        node = world.nodes[client.nodes[which]]
        node.pause()
        world.run_for(seconds)
        node.resume()
        world.settle(60.0)
        assert client.finish_reason is FinishReason.LENGTH
        world.run_until(world.is_ready)


@pytest.mark.fault("F09")
@pytest.mark.parametrize("name", ["p0", "d0", "router"])
@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_stopped_blames_nobody_else(name: str, seed: int) -> None:
    """SIGSTOP for longer than the peer timeout. Others may give it up; it gives nobody up."""
    with World(seed, prefill=2, decode=2, engine={"decode_token_s": 0.02, "eos_every": 0}) as world:
        clients = [world.submit(world.rng.randrange(1, 60), 190) for _ in range(6)]
        world.run_for(world.rng.random())
        processes: list[Process] = [world.router if name == "router" else world.nodes[name]]
        if name != "router":
            messager = world.nodes[name].messager
            assert messager is not None
            processes.append(messager)
        for process in processes:
            process.pause()
        world.run_for(7.0)
        for process in processes:
            process.resume()
        world.run_for(2.0)
        reasons = [str(log.fields.get("reason")) for process in processes for log in process.log]
        assert not [reason for reason in reasons if any(silent in reason for silent in SILENT)]
        world.settle(60.0)
        assert [client.error for client in clients] == [None] * 6
        assert name != "router" or world.router.machine.requests.counters.retries == 0


@pytest.mark.fault("F09")
@pytest.mark.parametrize(("name", "seed"), [("p0", 1), ("p0", 7), ("p0", 8), ("d0", 0)])
def test_a_node_that_was_lost_and_is_found_holds_no_old_attempts(name: str, seed: int) -> None:
    """SIGSTOP for longer than the peer timeout. It gives up what it still held long before ``transfer.timeout_s``.

    Of these attempts a prefill node asks for another decode node before the router knows it again.
    """
    with World(seed, prefill=2, decode=2, engine={"eos_every": 0}, transfer={"timeout_s": 60.0}) as world:
        for _ in range(24):
            world.submit(world.rng.randrange(20, 60), 8)
        node = world.nodes[name]
        assert node.messager is not None
        world.run_until(lambda: len(node.machine.requests) > 1)
        world.run_for(world.rng.uniform(0.0, 0.02))
        for process in (node, node.messager):
            process.pause()
        world.run_for(7.0)
        world.settle_clients()
        assert node.machine.requests
        for process in (node, node.messager):
            process.resume()
        world.settle(4.0)


# ---------------------------------------------------------------- failing steps, draining


@pytest.mark.fault("F07", "F23")
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_prefill_step_fails(step: int) -> None:
    """D never decodes from its empty blocks, another try serves the request, and others are served too."""
    with World(scheduler={"max_num_batched_tokens": 8}, engine={"eos_every": 0}) as world:
        world.nodes["p0"].failing_steps = {step}
        client = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.settle(1.0)
        assert client.error is None
        assert world.router.machine.requests.counters.retries == 1
        other = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.settle(1.0)
        assert other.error is None


FREED_S = 1.0
"""Within this time after P has given a request up, D has no slot for it any more."""


@pytest.mark.fault("F07", "F23")
@pytest.mark.parametrize("seed", range(4))
def test_three_in_ten_prefill_steps_fail_under_load(seed: int) -> None:
    """All requests are served in the end, and D does not keep slots for prompts that have failed."""
    limits = {"request_timeout_s": 100.0, "max_attempts": 30}
    with World(
        seed,
        prefill=2,
        decode=2,
        limits=limits,
        scheduler={"max_num_batched_tokens": 16},
        engine={"eos_every": 0, "step_s": 0.01},
        careful=True,
    ) as world:
        for name in ("p0", "p1"):
            world.nodes[name].failing_steps = {step for step in range(10_000) if world.rng.random() < 0.3}
        clients = []
        given_up_s: dict[Any, float] = {}
        for number in range(600):
            if number % 15 == 0:
                clients.append(world.submit(world.rng.randrange(1, 40), MAX_TOKENS))
            world.run_for(0.02)
            on_p = {request.attempt for name in ("p0", "p1") for request in world.nodes[name].machine.requests.open()}
            on_d = {
                request.attempt
                for name in ("d0", "d1")
                for request in world.nodes[name].machine.requests.open()
                if request.status in (DecodeStatus.RESERVING, DecodeStatus.RECEIVING)
            }
            given_up_s = {attempt: given_up_s.get(attempt, world.now) for attempt in on_d - on_p}
            assert all(world.now - since_s < FREED_S for since_s in given_up_s.values())
        world.settle(60.0)
        assert [client.error for client in clients] == [None] * len(clients)
        assert world.router.machine.requests.counters.retries > 10


@pytest.mark.parametrize("roles", [{}, {"prefill": 0, "decode": 0, "mixed": 1}])
def test_a_decode_step_fails(roles: dict[str, Any]) -> None:
    with World(**roles, engine={"eos_every": 0}) as world:
        name = "m0" if roles else "d0"
        world.nodes[name].failing_steps = {5}
        clients = [world.submit(PROMPT_LEN, MAX_TOKENS) for _ in range(3)]
        world.settle(1.0)
        assert [client.error for client in clients] == [None] * 3
        assert world.router.machine.requests.counters.retries > 0


@pytest.mark.parametrize("roles", [{}, {"prefill": 0, "decode": 0, "mixed": 1}])
def test_every_step_fails(roles: dict[str, Any]) -> None:
    """Each request gets an error that is about itself."""
    with World(**roles, engine={"eos_every": 0}) as world:
        node = world.nodes["m0" if roles else "p0"]
        node.failing_steps = set(range(100))
        clients = [world.submit(PROMPT_LEN, MAX_TOKENS) for _ in range(3)]
        world.settle(30.0)
        assert [client.error for client in clients] == ["engine_error"] * 3
        node.failing_steps = set()
        other = world.submit(PROMPT_LEN, MAX_TOKENS)
        world.settle(1.0)
        assert other.error is None


@pytest.mark.fault("F20")
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_node_drains_under_load_and_no_request_fails(name: str) -> None:
    for delay_s in (0.0, 0.002, 0.006, 0.02):
        with World(prefill=2, decode=2, engine={"eos_every": 0}) as world:
            node = world.nodes[name]
            clients = [world.submit(world.rng.randrange(1, 40), MAX_TOKENS) for _ in range(6)]
            world.run_for(delay_s)
            world.stop(name)
            clients += [world.submit(world.rng.randrange(1, 40), MAX_TOKENS) for _ in range(4)]
            world.settle(30.0)
            assert node.exit_reason == "drained"
            assert [client.error for client in clients] == [None] * 10


def test_a_node_that_is_told_twice_to_stop_hands_its_requests_back_at_once() -> None:
    for which in (0, 1):
        with World(prefill=2, decode=2, engine={"eos_every": 0, "step_s": 0.5}) as world:
            client = world.submit(PROMPT_LEN, MAX_TOKENS)
            world.run_for(1.2 if which else 0.2)
            node = world.nodes[client.nodes[which]]
            world.stop(node.config.name)
            world.stop(node.config.name)
            world.run_until(lambda node=node: node.exit_reason)  # type: ignore[misc]
            world.settle(60.0)
            assert node.exit_reason == "drained"
            assert client.error is None


@pytest.mark.fault("F20")
def test_a_drain_that_takes_too_long_hands_requests_back() -> None:
    with World(prefill=0, decode=0, mixed=2, engine={"eos_every": 0, "step_s": 1.0}) as world:
        client = world.submit(4, 60)
        world.run_for(3.0)
        world.stop(client.nodes[0])
        world.settle(100.0)
        assert client.error is None
        assert client.nodes[0] not in world.nodes


@pytest.mark.fault("F20")
def test_a_node_that_is_lost_and_found_again_while_it_drains_gets_no_prompts() -> None:
    with World(engine={"eos_every": 0, "step_s": 20.0}) as world:
        client = world.submit(PROMPT_LEN, 2)
        world.run_for(1.0)
        for message in ("Heartbeat", "Leaving"):
            world.link.drop(message, source="p0", target="router")
        world.stop("p0")
        world.run_until(lambda: not any(node.node_id == "p0" for node in world.router.machine.node_table), 8.0)
        world.link.heal()
        for name in ("d1", "d2", "d3"):  # each is a reason to try again
            world.start(name, Role.DECODE)
            world.run_for(1.0)
        world.run_until(lambda: "p0" not in world.nodes)
        world.start("p0", Role.PREFILL)
        world.settle()
        assert client.error is None


# ---------------------------------------------------------------- the router


@pytest.mark.fault("F13")
def test_a_router_that_comes_anew_makes_the_nodes_drop_what_they_hold() -> None:
    """Nobody waits for requests of a router that is gone; the nodes register with the new one and serve."""
    for message in ("KVFrame", "HandOff", "TokensOut"):
        with World(engine={"eos_every": 0}) as world:
            world.submit(PROMPT_LEN, 40)
            world.run_until_sent(message)
            world.restart_router()
            world.run_until(world.is_ready, 10.0)
            world.run_for(1.0)
            client = world.submit(PROMPT_LEN, MAX_TOKENS)
            world.settle(10.0)
            assert client.error is None
