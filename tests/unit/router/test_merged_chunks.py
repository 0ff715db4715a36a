"""Tokens that wait for their client's turn become one chunk, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
from fake_nodes import ANSWER, FakeCluster, Script, fake_cluster
from instant_router import InstantRouter

from kvrelay.errors import NoNodeError
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import FinishReason, SamplingParams, TokenLogprobs
from router.events import Delivery, NewRequest, RequestEnded, RequestErrored, TokensDelivered
from router.openai.answer import Answer, AnswerHead
from router.openai.choice import Choice, Delta
from router.openai.completions import CompletionStyle
from router.openai.errors import AnswerError
from router.openai.generation import MAX_MERGED, ClientLeftError, Generation, merged
from router.openai.schemas import CompletionRequest, StreamOptions
from router.text.output_text import TextOptions
from router.text.stop import StopStrings

Act = Callable[[Generation], Coroutine[Any, Any, None]]


class Backend:
    """Notes what it is told. ``deliver``: what deliveries are given to."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def submit(self, requests: Sequence[NewRequest], deliver: Callable[[RequestId, Delivery], None]) -> None:
        self.deliver = deliver

    def stop_matched(self, request_id: RequestId) -> None:
        self.told.append(f"stop {request_id}")

    def client_disconnected(self, request_id: RequestId) -> None:
        self.told.append(f"gone {request_id}")

    def tokens(self, choice: Choice, num_tokens: int) -> None:
        self.told.append(f"{num_tokens} of {choice.request_id}")

    def ended(self, choice: Choice, outcome: str) -> None:
        self.told.append(f"{outcome} {choice.request_id}")


ROUTER = InstantRouter()
MODEL = ROUTER.service.model


def letters(text: str) -> list[int]:
    return MODEL.tokenizer.encode(text)


def choice(name: str = "a", index: int = 0, **options: Any) -> Choice:
    request = NewRequest(RequestId(name), letters("p"), SamplingParams(max_tokens=1 << 20, seed=0))
    return Choice(index, 0, request, MODEL.tokenizer.token_bytes, TextOptions(**options))


def tokens(text: str, finish_reason: FinishReason | None = None) -> TokensDelivered:
    ids = letters(text)
    return TokensDelivered(ids, [TokenLogprobs(-0.5, [], []) for _ in ids], finish_reason=finish_reason)


class Client:
    """Takes deltas one at a time."""

    def __init__(self, choices: Sequence[Choice], interval: int = 1) -> None:
        self.backend = Backend()
        self.generation = Generation(choices, self.backend, self.backend, interval=interval)
        self.generation.start()
        self._deltas = self.generation.deltas()

    def deliver(self, *deliveries: Delivery, name: str = "a") -> None:
        for delivery in deliveries:
            self.backend.deliver(RequestId(name), delivery)

    async def next(self) -> Delta:
        return await anext(self._deltas)

    async def texts(self) -> list[str]:
        return [delta.text async for delta in self._deltas]

    async def waits(self) -> bool:
        """Return whether no delta is due; one that was being waited for is lost."""
        task = asyncio.ensure_future(self.next())
        for _ in range(5):
            await asyncio.sleep(0)
        return not task.done() and task.cancel()


def test_what_waits_is_one_delta_with_everything_joined_and_the_end_only_at_the_end() -> None:
    async def scenario() -> None:
        client = Client([choice()])
        client.deliver(tokens("H"))
        assert (await client.next()).text == "H"
        client.deliver(tokens("e"), tokens("ll"), tokens("o", FinishReason.LENGTH), RequestEnded(FinishReason.LENGTH))
        delta = await client.next()
        assert (delta.text, delta.token_ids, delta.finish_reason) == ("ello", letters("ello"), "length")
        assert len(delta.logprobs) == 4
        assert await client.texts() == []
        assert client.backend.told == ["1 of a", "4 of a", "ok a"]

    asyncio.run(scenario())


def test_a_client_that_keeps_up_gets_a_delta_per_step() -> None:
    async def scenario() -> None:
        client = Client([choice()])
        for letter in "Hello":
            client.deliver(tokens(letter))
            assert (await client.next()).text == letter

    asyncio.run(scenario())


def test_a_delta_has_a_bounded_number_of_deliveries() -> None:
    async def scenario() -> None:
        client = Client([choice()])
        client.deliver(*[tokens("x") for _ in range(2 * MAX_MERGED)], tokens("!", FinishReason.LENGTH))
        assert await client.texts() == ["x" * MAX_MERGED, "x" * MAX_MERGED, "!"]

    asyncio.run(scenario())


def test_choices_take_turns() -> None:
    async def scenario() -> None:
        client = Client([choice("a", 0), choice("b", 1)])
        client.deliver(*[tokens("x") for _ in range(MAX_MERGED + 1)])
        client.deliver(tokens("y"), tokens("y"), name="b")
        assert [(delta.index, len(delta.text)) for delta in [await client.next() for _ in range(3)]] == [
            (0, MAX_MERGED),
            (1, 2),
            (0, 1),
        ]

    asyncio.run(scenario())


def test_tokens_before_an_error_are_delivered_before_it_is_raised() -> None:
    async def scenario() -> None:
        client = Client([choice()])
        client.deliver(tokens("a"), tokens("b"), RequestErrored.of(NoNodeError("all gone")))
        assert (await client.next()).text == "ab"
        with pytest.raises(AnswerError, match="all gone"):
            await client.next()

    asyncio.run(scenario())


def test_a_stop_string_within_merged_tokens_drops_what_follows() -> None:
    async def scenario() -> None:
        client = Client([choice(stop=StopStrings(["lo"]))])
        client.deliver(*map(tokens, "Hello there"))
        delta = await client.next()
        assert (delta.text, delta.token_ids) == ("Hel", letters("Hello"))
        assert (delta.finish_reason, delta.stop_reason) == ("stop", "lo")
        assert client.backend.told == ["5 of a", "stop a", "ok a"]

    asyncio.run(scenario())


def test_a_client_that_left_gets_nothing_more() -> None:
    async def scenario() -> None:
        client = Client([choice()])
        client.deliver(tokens("a"))
        client.generation.client_left()
        with pytest.raises(ClientLeftError):
            await client.next()
        client.generation.close()
        assert client.backend.told == ["gone a", "aborted a"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("stop", "told"), [("lo", ["5 of a", "ok a"]), ("not there", ["5 of a", "aborted a"])])
def test_a_slow_client_ends_no_later_request_with_the_id_of_its_own(stop: str, told: list[str]) -> None:
    async def scenario() -> None:
        client = Client([choice(stop=StopStrings([stop]))], interval=2)
        client.deliver(tokens("Hello"), RequestErrored.of(NoNodeError("all gone")))
        await client.next()
        client.generation.close()
        assert client.backend.told == told

    asyncio.run(scenario())


def test_a_choice_that_no_node_computes_ends_nothing() -> None:
    async def scenario() -> None:
        request = NewRequest(RequestId("a"), letters("p"), SamplingParams(max_tokens=0, seed=0))
        client = Client([Choice(0, 0, request, MODEL.tokenizer.token_bytes, TextOptions())])
        client.generation.close()
        assert client.backend.told == ["aborted a"]

    asyncio.run(scenario())


def test_an_interval_holds_back_all_but_the_first_and_the_last_tokens() -> None:
    async def scenario() -> None:
        client = Client([choice("a", 0), choice("b", 1)], interval=3)
        client.deliver(tokens("a"))
        assert (await client.next()).text == "a"  # the first is never delayed
        client.deliver(tokens("b"), tokens("c"))
        client.deliver(tokens("x"), name="b")
        assert (await client.next()).text == "x"
        client.deliver(tokens("d"))
        assert (await client.next()).text == "bcd"
        client.deliver(tokens("e"))
        client.deliver(tokens("y", FinishReason.LENGTH), name="b")
        assert (await client.next()).text == "y"
        client.deliver(tokens("f"))
        assert await client.waits()

    asyncio.run(scenario())


# ---------------------------------------------------------------- the same over HTTP, however chunks are cut

BODIES: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "a"},
    "logprobs": {"prompt": "a", "logprobs": 2},
    "echo": {"prompt": "a", "echo": True},
    "ids": {"prompt": "a", "return_token_ids": True},
    "stop": {"prompt": "a", "stop": ["END", "says no"]},
    "several": {"prompt": ["a", "b"], "n": 2},
    "usage": {"prompt": "a", "stream_options": {"include_usage": True}},
    "continuous": {"prompt": "a", "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "chat logprobs": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1},
}


def joined(chunks: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return each choice's texts, token ids and logprobs joined, with all other fields as they last were."""
    found: dict[int, dict[str, Any]] = {}
    for item in (item for chunk in deepcopy(chunks) for item in chunk["choices"]):
        known = found.setdefault(item["index"], {"text": "", "token_ids": [], "logprobs": {}})
        delta = item.pop("delta", {})
        known["text"] += item.pop("text", "") + delta.pop("content", "")
        known["token_ids"] += item.pop("token_ids", [])
        for name, values in (item.pop("logprobs") or {}).items():
            known["logprobs"].setdefault(name, []).extend(values)
        known |= delta | item
    return found


async def chunks_of(cluster: FakeCluster, body: dict[str, Any]) -> list[dict[str, Any]]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    fields = {"model": "demo", "seed": 0, "stream": True, "max_tokens": len(ANSWER.encode())}
    response = await cluster.client.post(path, json={**fields, **body})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("interval", [1, 7])
def test_merged_chunks_hold_what_single_ones_hold(name: str, interval: int) -> None:
    async def chunks(script: Script, stream_interval: int) -> list[dict[str, Any]]:
        async with fake_cluster(script, stream_interval=stream_interval) as cluster:
            found = await chunks_of(cluster, BODIES[name])
            await cluster.quiet()
            return found

    single = asyncio.run(chunks(Script(in_step=True), 1))
    large = asyncio.run(chunks(Script(), interval))
    assert len(large) < len(single)
    assert all(chunk.keys() >= {"id", "object", "created", "model", "choices"} for chunk in large)
    for found in (single, large):
        ends = [[item["finish_reason"] for item in chunk["choices"]] for chunk in found if chunk["choices"]]
        assert sum(end != [None] for end in ends) == len(joined(found))
    if name in ("usage", "continuous"):
        assert large[-1]["usage"] == single[-1]["usage"]
    if name == "continuous":
        counts = [chunk["usage"]["completion_tokens"] for chunk in large]
        assert all(before <= after for before, after in pairwise(counts))
    assert joined(large) == joined(single)


# ---------------------------------------------------------------- templates


class WithoutTemplate(CompletionStyle):
    def is_only_text(self, delta: Delta) -> bool:
        return False


@pytest.mark.parametrize("options", [None, StreamOptions(include_usage=True)])
@pytest.mark.parametrize("model", ["demo", "\ue0fftext\ue0ff", 'a "model" \\ with \u2028 marks'])
def test_chunks_made_from_a_template_equal_those_encoded_whole(options: StreamOptions | None, model: str) -> None:
    request = CompletionRequest(model="demo", prompt="p", stream=True, stream_options=options)
    deltas = [Delta(index, text, letters("x")) for text in ("a", "", 'é "q" \x00\n\n\u2028', "🦊") for index in (0, 1)]
    deltas += [Delta(index, "z", letters("z"), finish_reason=FinishReason.STOP, stop_reason=7) for index in (0, 1)]

    async def events(kind: type[CompletionStyle]) -> list[bytes]:
        async def source() -> Any:
            for delta in deltas:
                yield delta

        choices = [choice("a", 0), choice("b", 1)]
        style = kind(MODEL, request, choices, None)
        answer = Answer(AnswerHead("cmpl-1", 1, model), style, choices, request)
        return [event async for event in answer.events(source())]

    assert asyncio.run(events(CompletionStyle)) == asyncio.run(events(WithoutTemplate))


def test_merging_one_delivery_returns_it() -> None:
    delivery = tokens("a")
    assert merged([delivery]) is delivery
