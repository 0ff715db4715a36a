"""The network loses, delays, repeats, reorders and damages messages: no token is wrong, nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
from support.ids import block_ids
from support.world import World

from decode_node.machine import DecodeMachine
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.request import FinishReason

HEARTBEATS = ["Heartbeat", "MessagerStats"]

RECOVERED = [
    "Register",
    "Registered",
    "ReserveBlocks",
    "BlocksReserved",
    "HandOff",
    "LinkHello",
    "LinkAccepted",
    "KVFrame",
    "FrameAck",
    "RequestTimeline",
    "ExpectKV",
    "KVExpected",
    "KVArrived",
    "TransferDone",
    *HEARTBEATS,
]
"""What may get lost with a request served all the same: somebody notices within the transfer's timeouts."""

GIVEN_UP = ["Prefill", "TokensOut", "LayerSignal", "OpenTransfer"]
"""What only the request's own deadline notices. The last two never leave their host."""


def cluster(seed: int = 7, **options: Any) -> World:
    return World(
        seed,
        prefill=2,
        decode=2,
        cache={"num_blocks": 24},
        limits={"request_timeout_s": 60.0},
        engine={"eos_every": 0},
        **options,
    )


@pytest.mark.fault("F16")
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("message", RECOVERED)
def test_a_message_is_lost_and_the_request_served_all_the_same(message: str, nth: int) -> None:
    with cluster() as world:
        fault = world.link.drop(message, nth)
        clients = [world.submit(length, 12) for length in (5, 17, 40, 30)]
        world.settle(60.0)
        if message in HEARTBEATS:
            world.run_until(lambda: fault.num_seen >= nth)
            world.settle(60.0)
        assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 4


@pytest.mark.fault("F16")
@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("message", GIVEN_UP)
def test_a_message_is_lost_and_the_request_ends_at_its_deadline(message: str, nth: int) -> None:
    with cluster() as world:
        world.link.drop(message, nth)
        clients = [world.submit(length, 12) for length in (5, 17, 40, 30)]
        world.settle(61.0)
        assert sorted(client.error or "" for client in clients) == ["", "", "", "transfer_timeout"]


@pytest.mark.fault("F16")
@pytest.mark.fault("F16")
@pytest.mark.parametrize("nth", [1, 2])
def test_a_decode_node_is_not_told_of_a_prefill_node(nth: int) -> None:
    """It refuses reservations of a node that no router has named, and asks its routers for the names."""
    with World(engine={"eos_every": 0}) as world:
        world.link.drop("PrefillNodes", nth)
        world.restart("p0")
        world.run_for(8.0)
        client = world.submit(20, 12)
        world.settle(30.0)
        assert client.error is None
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.parametrize("message", ["Abort", "CancelReservation"])
def test_a_cancellation_is_lost(message: str) -> None:
    """Whoever goes on with what nobody wants is told so, or finds its lease over."""
    for boundary in ("ReserveBlocks", "BlocksReserved", "KVFrame", "HandOff", "TokensOut"):
        for nth in (1, 2):
            with cluster() as world:
                client = world.submit(27, 40)
                world.run_until_sent(boundary)
                world.link.drop(message, nth)
                world.abort(client)
                world.settle(30.0)
                assert client.finish_reason is FinishReason.ABORT


@pytest.mark.fault("F16")
@pytest.mark.parametrize("message", ["RequestFailed", "DecodeNeeded", "AssignDecode", "ReservationRefused"])
def test_an_answer_to_a_failure_is_lost(message: str) -> None:
    """The request ends in time, one way or the other, and nothing is left of it."""
    with World(
        decode=2,
        cache={"num_blocks": 24, "prefix_caching": False},
        nodes={"d0": {"cache": {"num_blocks": 12}}, "d1": {"cache": {"num_blocks": 12}}},
        limits={"request_timeout_s": 60.0},
        engine={"eos_every": 0},
    ) as world:
        for _ in range(2):
            world.submit(20, 20)
        fault = world.link.drop(message, 1)
        if message == "RequestFailed":
            world.link.corrupt("KVFrame", 1)
            world.nodes["p0"].failing_steps = {2}
        for _ in range(2):
            world.submit(20, 20)
        world.settle(61.0)
        assert fault.num_seen > 0


@pytest.mark.fault("F14")
@pytest.mark.parametrize("seconds", [0.0, 0.01, 3.0])
@pytest.mark.parametrize(
    "message",
    [
        "Register",
        "Registered",
        "Prefill",
        "ReserveBlocks",
        "BlocksReserved",
        "HandOff",
        "TokensOut",
        "LinkHello",
        "LinkAccepted",
        "KVFrame",
        "FrameAck",
        "RequestTimeline",
        "Heartbeat",
    ],
)
def test_a_message_comes_twice(message: str, seconds: float) -> None:
    """The second may come long after everything is over: a replay."""
    with cluster(transfer={"link": "tcp"}) as world:
        world.link.duplicate(message, seconds)
        clients = [world.submit(length, 12) for length in (5, 17, 40, 30)]
        world.settle(20.0)
        world.run_for(5.0)
        world.settle(20.0)
        assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 4


@pytest.mark.parametrize("message", ["ReserveBlocks", "BlocksReserved", "HandOff", "TokensOut", "KVFrame", "FrameAck"])
def test_a_message_is_overtaken(message: str) -> None:
    for seconds in (0.001, 0.02):
        for nth in (1, 2, 3):
            with cluster(transfer={"link": "tcp"}) as world:
                world.link.overtake(message, seconds, nth)
                clients = [world.submit(length, 12) for length in (5, 17, 40, 30)]
                world.settle(20.0)
                assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 4


@pytest.mark.fault("F14")
@pytest.mark.parametrize("message", ["Prefill", "ReserveBlocks", "BlocksReserved", "HandOff", "KVFrame", "KVArrived"])
@pytest.mark.parametrize("seconds", [2.0, 12.0])
def test_a_connection_is_slow(message: str, seconds: float) -> None:
    """Shorter and longer than every timeout of the transfer."""
    with cluster() as world:
        world.link.delay(message, seconds, 1)
        clients = [world.submit(length, 12) for length in (5, 17, 40, 30)]
        world.settle(60.0)
        assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 4


# ---------------------------------------------------------------- damaged KV


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_damaged_frame_is_a_failed_transfer_and_never_a_wrong_token(nth: int) -> None:
    with World(transfer={"link": "tcp"}, engine={"eos_every": 0}) as world:
        world.link.corrupt("KVFrame", nth)
        clients = [world.submit(length, 12) for length in (5, 17, 40)]
        world.settle(10.0)
        assert world.counted("corrupt_frames", "d") <= 1
        assert world.router.machine.requests.counters.retries == 1
        assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 3


def test_a_line_that_damages_everything_ends_in_a_typed_error() -> None:
    with World(transfer={"link": "tcp"}, engine={"eos_every": 0}) as world:
        world.link.corrupt("KVFrame")
        client = world.submit(20, 12)
        world.settle(30.0)
        assert client.error == "corrupt_kv"
        assert world.router.machine.requests.counters.attempts == 3


def test_a_damaged_block_of_the_prefix_cache_on_a_device_costs_one_retry() -> None:
    """Its digest and its bytes differ from some moment on, so every attempt that sent it again would fail."""
    with World(engine={"eos_every": 0, "device_pool": True}) as world:
        prompt = list(range(1, 30))
        world.submit(prompt, 12)
        world.settle(10.0)
        pool = world.nodes["p0"].engine.memory
        assert isinstance(pool, DeviceMemory)
        every, planes = block_ids(*range(pool.num_blocks)), range(1, 2)
        pool._table.put(planes, every, pool._table.get(planes, every) ^ 1)  # else P's own first token would be wrong
        world.restart("d0")  # which has none of the prompt's blocks then
        world.run_for(3.0)
        client = world.submit(prompt, 12)
        world.settle(10.0)
        assert client.finish_reason == FinishReason.LENGTH
        assert world.router.machine.requests.counters.retries == 1


@pytest.mark.fault("F14")
def test_what_is_overwritten_on_p_under_way_is_noticed() -> None:
    """The pages are read when a frame leaves: were P's blocks given away too early, the digest would tell."""
    with World(transfer={"link": "tcp"}, engine={"eos_every": 0}, cache={"prefix_caching": False}) as world:
        slow = world.link.delay("KVFrame", 0.05)
        client = world.submit(20, 12)
        world.run_until_arrived("TokensOut")
        world.link.faults.remove(slow)
        pool = world.nodes["p0"].engine.memory
        assert isinstance(pool, KVMemory)
        pool.planes[:] = 0
        world.settle(30.0)
        assert client.error is None
        assert world.router.machine.requests.counters.retries == 1


# ---------------------------------------------------------------- leases


@pytest.mark.fault("F05")
def test_a_reservation_outlives_its_lease_while_p_says_that_it_works_on_it() -> None:
    """P needs three times the lease for the prompt."""
    with World(transfer={"lease_s": 2.0}, engine={"eos_every": 0, "prefill_token_s": 0.2}) as world:
        client = world.submit(30, 5)
        world.settle(20.0)
        assert client.error is None
        assert world.link.sent["RenewReservations"] >= 5
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.fault("F05")
def test_a_reservation_nobody_renews_is_given_up() -> None:
    """D hears of P, but nothing of this reservation."""
    with World(transfer={"lease_s": 2.0}, engine={"eos_every": 0, "prefill_token_s": 0.2}) as world:
        lost = world.link.drop("RenewReservations")
        client = world.submit(30, 5)
        world.run_until_sent("ReservationEnded")
        world.link.faults.remove(lost)
        world.settle(60.0)
        assert client.error is None
        assert world.router.machine.requests.counters.retries == 1


@pytest.mark.parametrize("nth", [1, 2])
def test_one_lost_renewal_does_no_harm(nth: int) -> None:
    with World(transfer={"lease_s": 2.5}, engine={"eos_every": 0, "prefill_token_s": 0.2}) as world:
        world.link.drop("RenewReservations", nth)
        client = world.submit(30, 5)
        world.settle(20.0)
        assert client.error is None
        assert world.router.machine.requests.counters.retries == 0


@pytest.mark.fault("F06")
def test_a_renewal_of_what_is_over_is_answered_at_once() -> None:
    """D gave the reservation up; P hears of it with its next word and does not go on sending."""
    with World(engine={"eos_every": 0, "prefill_token_s": 0.2}) as world:
        client = world.submit(30, 5)
        world.run_until_arrived("BlocksReserved")
        machine = world.nodes["d0"].machine
        assert isinstance(machine, DecodeMachine)
        [request] = machine.requests.receiving
        machine._endings.close(request, "the test says so")
        world.run_until_arrived("ReservationEnded")
        world.settle(60.0)
        assert client.error is None


# ---------------------------------------------------------------- everything at once


@pytest.mark.fault("F18")
@pytest.mark.parametrize("seed", range(25))
def test_chaos(seed: int) -> None:
    """A few per cent of all messages between hosts are lost, repeated, late, out of order or damaged."""
    with World(
        seed,
        prefill=2,
        decode=2,
        cache={"num_blocks": 40},
        transfer={"link": "tcp" if seed % 2 else "auto"},
        limits={"request_timeout_s": 90.0, "max_attempts": 5},
        careful=True,
    ) as world:
        world.link.disturb(drop=0.01, duplicate=0.03, overtake=0.03, delay=0.03, corrupt=0.01)
        for _ in range(10):
            world.submit(world.rng.randrange(1, 60), world.rng.randrange(1, 20))
            world.run_for(world.rng.random() * 0.02)
        world.run_until(world.all_ended, 100.0)
        world.link.heal()
        world.settle(60.0)
        assert sum(client.error is None for client in world.clients.values()) >= 5
