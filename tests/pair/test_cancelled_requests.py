"""A request is cancelled in each of its phases, by its client, an operator or its deadline: nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.world import Client, World
from test_resuming import STORE

from decode_node.request import DecodeRequest, DecodeStatus
from kvrelay.config.cluster_config import Role
from kvrelay.node.request import NodeRequest
from kvrelay.protocol.ids import RequestId
from prefill_node.request import PrefillRequest, PrefillStatus, Reservation
from router.request import Status

CHOOSES_PLANS_IN_FLIGHT = True
PROMPT_LEN, MAX_TOKENS = 30, 24
GONE_S = 1.0
"""Within this time nobody may know of a cancelled request."""

STEP_S = 0.1
"""So slow that a request which nobody stops goes on for longer than GONE_S."""

CAUSES: dict[str, tuple[Callable[[World, Client], None], str | None]] = {
    "client gone": (World.abort, None),
    "operator": (World.cancel, "request_cancelled"),
    "deadline": (World.pass_deadline, "transfer_timeout"),
}
"""Who cancels, and the code of the error that the client gets. At its deadline it may be without a node."""


def on_nodes(world: World, client: Client, letter: str) -> list[NodeRequest[Any]]:
    """Return what the nodes whose name begins with ``letter`` have of a request."""
    nodes = [node for name, node in world.nodes.items() if name.startswith(letter)]
    return [
        request for node in nodes for request in node.machine.requests if request.spec.request_id == client.request_id
    ]


def on_router(status: Status) -> Callable[[World, Client], bool]:
    def is_there(world: World, client: Client) -> bool:
        request = world.router.machine.requests._table.get(RequestId(client.request_id))
        return request is not None and request.status is status

    return is_there


def on_p(status: PrefillStatus, reservation: Reservation | None = None) -> Callable[[World, Client], bool]:
    def is_there(world: World, client: Client) -> bool:
        return any(
            isinstance(request, PrefillRequest)
            and request.status is status
            and reservation in (None, request.reservation)
            for request in on_nodes(world, client, "p")
        )

    return is_there


def on_d(
    status: DecodeStatus, *, arrived: bool | None = None, handed_off: bool | None = None, letter: str = "d"
) -> Callable[[World, Client], bool]:
    def is_there(world: World, client: Client) -> bool:
        return any(
            isinstance(request, DecodeRequest)
            and request.status is status
            and arrived in (None, request.kv_arrived)
            and handed_off in (None, request.handed_off)
            for request in on_nodes(world, client, letter)
        )

    return is_there


def on_m(status: DecodeStatus) -> Callable[[World, Client], bool]:
    return on_d(status, letter="m")


def no_preparation(world: World) -> list[int]:
    """Return the prompt to submit."""
    return world.prompt(PROMPT_LEN)


def without_prefill_node(world: World) -> list[int]:
    world.kill("p0")
    world.run_for(8.0)  # it is given up
    world.after(3.0, lambda: start_again(world))
    return world.prompt(PROMPT_LEN)


def late(message: str) -> Callable[[World], list[int]]:
    """Have every ``message`` come late."""

    def prepare(world: World) -> list[int]:
        world.link.delay(message, 0.1)
        return no_preparation(world)

    return prepare


def lent(world: World) -> list[int]:
    """Have the decode node say that it has room for prompts."""
    world.run_until(lambda: all(node.num_heartbeats for node in world.router.machine.node_table))
    return world.prompt(PROMPT_LEN)


def start_again(world: World) -> None:
    world.start("p0", Role.PREFILL)


def stored(world: World) -> list[int]:
    """Have a prompt's KV in the store, and not on P."""
    prompt = world.prompt(PROMPT_LEN)
    world.submit(prompt, 2)
    world.settle()
    world.restart("p0")
    world.run_until(world.is_ready)
    return prompt


@dataclass(frozen=True)
class Phase:
    """A phase of a request: when it is there, and in what cluster it comes."""

    is_there: Callable[[World, Client], bool]
    prepare: Callable[[World], list[int]] = no_preparation
    options: dict[str, Any] = field(default_factory=dict)
    num_others: int = 2


SMALL_P: dict[str, Any] = {"nodes": {"p0": {"cache": {"num_blocks": 12}}}}
SMALL_D: dict[str, Any] = {
    "nodes": {"d0": {"cache": {"num_blocks": 20}, "scheduler": {"reserve_policy": "none", "watermark": 0.0}}}
}
"""Two requests fit beside each other when they come to D, and not when they end."""

LENT: dict[str, Any] = {"router": {"local_prefill_tokens": 0}}
"""D computes every prompt for which it has room."""

MIXED: dict[str, Any] = {"prefill": 0, "decode": 0, "mixed": 1}
SMALL_MIXED: dict[str, Any] = {**MIXED, "nodes": {"m0": {"cache": {"num_blocks": 20}}}}
STORING_MIXED: dict[str, Any] = {
    **MIXED,
    "storage": STORE,
    "nodes": {"m0": {"cache": {"num_blocks": 20}, "scheduler": {"reserve_policy": "none", "watermark": 0.0}}},
}

PHASES: dict[str, Phase] = {
    "waits at the router": Phase(on_router(Status.WAITING), without_prefill_node, num_others=0),
    "queued on P": Phase(on_p(PrefillStatus.QUEUED), options=SMALL_P),
    "read from the store on P": Phase(on_p(PrefillStatus.LOADING), stored, {"storage": STORE}),
    "reservation asked": Phase(on_p(PrefillStatus.RUNNING_PREFILL, Reservation.ASKED)),
    "D's messager prepares": Phase(on_d(DecodeStatus.RESERVING)),
    "seeks another D": Phase(on_router(Status.SEEKING_DECODE), options=SMALL_D),
    "computed with blocks reserved": Phase(on_p(PrefillStatus.RUNNING_PREFILL, Reservation.GRANTED)),
    "layers arrive": Phase(on_d(DecodeStatus.RECEIVING, arrived=False)),
    "first token, last layers under way": Phase(on_p(PrefillStatus.SENDING)),
    "first token, no layer yet": Phase(
        on_d(DecodeStatus.RECEIVING, arrived=False, handed_off=True), late("KVFrame"), num_others=0
    ),
    "all layers, no first token yet": Phase(
        on_d(DecodeStatus.RECEIVING, arrived=True, handed_off=False), late("HandOff"), num_others=0
    ),
    "decoding": Phase(on_d(DecodeStatus.RUNNING_DECODE)),
    "preempted, KV is saved": Phase(on_d(DecodeStatus.PREEMPTED), options={"storage": STORE, **SMALL_D}, num_others=1),
    "read from the store on D": Phase(on_d(DecodeStatus.LOADING), options={"storage": STORE, **SMALL_D}, num_others=1),
    "computed again on D": Phase(on_d(DecodeStatus.RUNNING_PREFILL), options=SMALL_D, num_others=1),
    "queued on D, which computes it": Phase(on_d(DecodeStatus.WAITING), lent, LENT),
    "computed on D alone": Phase(on_d(DecodeStatus.RUNNING_PREFILL), lent, LENT),
    "queued on a mixed node": Phase(on_m(DecodeStatus.WAITING), options=SMALL_MIXED),
    "read from the store on a mixed node": Phase(on_m(DecodeStatus.LOADING), options=STORING_MIXED, num_others=1),
    "computed on a mixed node": Phase(on_m(DecodeStatus.RUNNING_PREFILL), options=MIXED),
    "decoded on a mixed node": Phase(on_m(DecodeStatus.RUNNING_DECODE), options=MIXED),
}


@pytest.mark.fault("F08")
@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_request_is_cancelled_and_nothing_is_left(phase: str, cause: str) -> None:
    """Right at the beginning of the phase, and somewhat later; other requests get their tokens."""
    there = PHASES[phase]
    cancel, code = CAUSES[cause]
    if cause == "deadline" and phase in ("waits at the router", "seeks another D"):
        code = "no_node_available"
    for seed in range(4):
        engine = {"eos_every": 0, "max_plans_in_flight": 1 + seed % 2, "step_s": STEP_S}
        with World(
            seed, careful=True, scheduler={"max_num_batched_tokens": 16}, engine=engine, **there.options
        ) as world:
            check(world, there, cancel, code, 0.0 if seed < 2 else world.rng.random() * STEP_S / 2)


def check(
    world: World, there: Phase, cancel: Callable[[World, Client], None], code: str | None, delay_s: float
) -> None:
    """Cancel a request ``delay_s`` after the beginning of a phase."""
    world.store.call_s = 0.02
    prompt = there.prepare(world)
    others = [world.submit(PROMPT_LEN, MAX_TOKENS) for _ in range(there.num_others)]
    client = world.submit(prompt, MAX_TOKENS)
    world.run_until(lambda: there.is_there(world, client))
    world.run_for(delay_s)
    cancel(world, client)
    gone_s = world.now + GONE_S
    world.run_until(lambda: not [request for letter in "pdm" for request in on_nodes(world, client, letter)])
    assert world.now <= gone_s
    others.append(world.submit(prompt, MAX_TOKENS))
    world.settle(60.0)
    assert client.error == code
    assert len(client.token_ids) < MAX_TOKENS
    assert [other.error for other in others] == [None] * len(others)
