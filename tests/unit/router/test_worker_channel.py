"""The channel between the router and a worker: every message arrives, in order, whatever pieces the bytes come in."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from fake_nodes import until

from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.base import ErrorInfo, HistogramReport
from kvrelay.protocol.request import FinishReason, Grammar, GrammarKind, PromptLogprobs, SamplingParams, TokenLogprobs
from kvrelay.protocol.token_rules import BadWords, TokenRules
from router.client_metrics import ClientReport
from router.events import (
    ClientGone,
    Deliver,
    NewRequest,
    PromptLogprobsDelivered,
    RequestEnded,
    RequestErrored,
    StopMatched,
    TokensDelivered,
)
from router.workers import messages
from router.workers.channel import LENGTH, MAX_WEIGHT, Channel, take_batch, weight
from router.workers.messages import FromWorker, Submission, ToWorker, WorkerMessage
from router.workers.remote import submissions

R = RequestId("cmpl-ä")
PARAMS = SamplingParams(max_tokens=3, seed=2**63 - 1, grammar=Grammar(GrammarKind.REGEX, "a+"))
TO_WORKER: list[ToWorker] = [
    Deliver(R, TokensDelivered([1, 2], [TokenLogprobs(-0.5, [1], [-0.5])], 7, FinishReason.STOP, 2)),
    Deliver(R, PromptLogprobsDelivered(PromptLogprobs(1, 0, b"\0" * 4, b"\1" * 4, b"\2" * 8))),
    Deliver(R, RequestEnded(FinishReason.LENGTH)),
    Deliver(R, RequestErrored(ErrorInfo(code="x", message="y", http_status=429), "n", 1.5)),
    messages.Serve(),
    messages.Stop(),
    messages.MaxModelLen(512),
    messages.ReportWanted(1),
    messages.Answered(2, 200, [(b"a", b"\xff")], b"body"),
    messages.InProgress(3, True),
    messages.UseBegun(4, float("inf"), []),
]
FROM_WORKER: list[FromWorker] = [
    messages.Ready(),
    Submission([NewRequest(R, [1, 2, 3], PARAMS, -1, "s", "a")], more=True),
    ClientGone(R),
    StopMatched(R),
    messages.Asked(1, "/cluster/requests/é", b"a=%20"),
    messages.InProgressAsked(2, [R]),
    messages.UseWanted(3, "alice", None, 5),
    messages.UseCharged(3, 17),
    messages.UseEnded(3),
    messages.Reported(
        0, ClientReport([("chat", "ok", 2)], {"stop": 2}, 3, 2, 1, [HistogramReport("", "", [1, 0], 0.5)])
    ),
]


def new_request(name: str, num_tokens: int) -> NewRequest:
    return NewRequest(RequestId(name), [1] * num_tokens, PARAMS)


async def pair(
    receive: Callable[[ToWorker], None], receive_back: Callable[[FromWorker], None]
) -> tuple[Channel, Channel]:
    """Return the router's channel and the worker's."""
    here, there = socket.socketpair()
    router, worker = Channel(FromWorker, receive_back), Channel(ToWorker, receive)
    await router.open(here)
    await worker.open(there)
    return router, worker


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(check(), 60)

    asyncio.run(bounded())


def test_every_message_arrives_equal_and_in_order() -> None:
    sent_kinds = {type(message) for message in (*TO_WORKER, *FROM_WORKER)}
    declared = {kind for kind in vars(messages).values() if isinstance(kind, type) and _is_tagged(kind)}
    assert declared - {ClientReport} <= sent_kinds, "a message is missing in this test"

    async def check() -> None:
        at_worker: list[ToWorker] = []
        at_router: list[FromWorker] = []
        router, worker = await pair(at_worker.append, at_router.append)
        for to_worker in TO_WORKER:
            router.send(to_worker)
        for from_worker in FROM_WORKER:
            worker.send(from_worker)
        await until(lambda: len(at_worker) == len(TO_WORKER))
        await worker.close()
        await router.lost.wait()
        assert at_worker == TO_WORKER
        assert at_router == FROM_WORKER

    run(check)


def _is_tagged(kind: type) -> bool:
    return issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None


def test_bytes_may_come_in_any_pieces() -> None:
    async def check() -> None:
        frames = [msgspec.msgpack.encode([message]) for message in FROM_WORKER]
        data = b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)
        rng = random.Random(5)
        for most in (1, 2, 7, 64, len(data)):
            received: list[FromWorker] = []
            channel = Channel(FromWorker, received.append)
            rest = data
            while rest:
                count = rng.randint(1, most)
                channel.data_received(rest[:count])
                rest = rest[count:]
            assert received == FROM_WORKER

    run(check)


def test_what_is_sent_in_one_turn_of_the_loop_is_one_frame() -> None:
    async def check() -> None:
        here, there = socket.socketpair()
        channel = Channel(FromWorker, lambda _: None)
        await channel.open(here)
        for number in range(64):
            channel.send(Deliver(RequestId(f"r{number}"), TokensDelivered([number])))
        with there:
            there.setblocking(False)
            data = await asyncio.get_running_loop().sock_recv(there, 1 << 20)
            (length,) = LENGTH.unpack_from(data)
            assert len(data) == LENGTH.size + length
            assert len(msgspec.msgpack.decode(data[LENGTH.size :])) == 64
        channel.abort()
        await channel.lost.wait()

    run(check)


def test_the_end_of_the_other_process_is_noticed_and_later_messages_are_dropped() -> None:
    async def check() -> None:
        here, there = socket.socketpair()
        channel = Channel(FromWorker, lambda _: None)
        await channel.open(here)
        there.close()
        await channel.lost.wait()
        channel.send(messages.Stop())
        await channel.close()

    run(check)


@pytest.mark.parametrize("lengths", [[], [3], [1] * 300, [MAX_WEIGHT * 3], [MAX_WEIGHT - 1, 1, 1], [9_000] * 20])
def test_long_prompts_are_sent_in_parts_of_bounded_weight(lengths: list[int]) -> None:
    requests = [new_request(f"r{number}", length) for number, length in enumerate(lengths)]
    parts = list(submissions(requests))
    assert [request for part in parts for request in part.requests] == requests
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    for part in parts:
        assert len(part.requests) <= 1 or sum(len(item.prompt_token_ids) for item in part.requests) <= MAX_WEIGHT


def test_choices_with_many_bad_words_are_sent_in_parts_of_bounded_weight() -> None:
    tokens = range(8192)
    words = [[token] for token in tokens[::2]] + [[token, token + 1] for token in tokens[:4096:2]]
    one = MAX_WEIGHT // 4 + 1
    cases: dict[str, dict[str, Any]] = {
        "bad words": {"token_rules": TokenRules(None, BadWords.of([*words, [1]]))},
        "biases": {"logit_bias": dict.fromkeys(range(one - 1), 1.0)},
        "stop tokens": {"stop_token_ids": list(range(one - 1))},
    }
    for name, fields in cases.items():
        params = msgspec.structs.replace(PARAMS, **fields)
        requests = [NewRequest(RequestId(f"r{number}"), [1], params) for number in range(20)]
        parts = list(submissions(requests))
        assert [request for part in parts for request in part.requests] == requests
        assert {len(part.requests) for part in parts[:-1]} == {3}, name
        assert all(weight(part) > MAX_WEIGHT // 2 for part in parts[:-1]), name


def test_a_frame_ends_when_it_is_heavy_enough() -> None:
    small = [ClientGone(RequestId(str(number))) for number in range(1000)]
    heavy = Submission([new_request("r", MAX_WEIGHT)])
    waiting: deque[WorkerMessage] = deque([*small, heavy, *small])
    frames = []
    while waiting:
        frames.append(take_batch(waiting))
    assert [message for frame in frames for message in frame] == [*small, heavy, *small]
    for frame in frames:
        assert sum(map(weight, frame[:-1])) < MAX_WEIGHT
