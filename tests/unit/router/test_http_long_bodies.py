"""Bodies that take long to read, check, render or tokenize: streams go on meanwhile. See ``no_stalls`` in conftest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_nodes import FakeCluster, Script, fake_cluster, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MIB = 1 << 20
WORDS = "Das ist ein Satz, der sich wiederholt. "


def run(scenario: Callable[[FakeCluster], Awaitable[None]], pace_s: float = 0.0, **router: object) -> None:
    """Run ``scenario`` against a cluster; afterwards nothing may be left of any request."""

    async def with_cluster() -> None:
        async with fake_cluster(Script(pace_s=pace_s), "prefill decode", **router) as cluster:
            await scenario(cluster)
            await cluster.quiet()

    asyncio.run(with_cluster())


def text(num_bytes: int) -> str:
    return (WORDS * (num_bytes // len(WORDS) + 1))[:num_bytes]


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def messages(count: int, **more: object) -> bytes:
    return b'{"messages": [%s]%s}' % (
        b", ".join([b'{"role": "user"}'] * count),
        b"".join(b', "%s": %s' % (name.encode(), json.dumps(value).encode()) for name, value in more.items()),
    )


REFUSED: list[tuple[str, bytes, int, str | None, str]] = [
    (COMPLETIONS, body(prompt=text(4 * MIB)), 400, "prompt", "you requested at least"),
    (COMPLETIONS, body(prompt="a" * (15 * MIB)), 400, "prompt", "you requested at least"),
    (COMPLETIONS, body(prompt=text(40_000)), 400, "prompt", "(40000 in the prompt, 16 in the completion)"),
    (COMPLETIONS, body(prompt=text(17 * MIB)), 413, None, "16777216 bytes"),
    (COMPLETIONS, body(prompt=["a"] * 500_000), 400, "n", "500000 requests; the limit is 512"),
    (COMPLETIONS, body(prompt=[7] * 2_000_000), 400, "prompt", "(2000000 in the prompt, 16 in the completion)"),
    (COMPLETIONS, body(prompt=[[7]] * 500_000), 400, "n", "500000 requests"),
    (COMPLETIONS, body(prompt=[7] * 500_000 + ["a"]), 400, "prompt", "should be a string, a list"),
    (COMPLETIONS, body(prompt="a", max_tokens=text(4 * MIB)), 400, "max_tokens", "integer"),
    (COMPLETIONS, body(prompt="a", model=text(4 * MIB)), 404, "model", "is not served here"),
    (COMPLETIONS, body(prompt="a", stop=["x"] * 500_000), 400, "stop", "at most 16"),
    (COMPLETIONS, body(prompt="a", logit_bias={str(n): "x" for n in range(200_000)}), 400, "logit_bias", ""),
    (COMPLETIONS, body(prompt="a", stop_token_ids=["x"] * 500_000), 400, "stop_token_ids", ""),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": ' + b"9" * (4 * MIB) + b"}", 400, None, "not JSON"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * MIB + b"]" * MIB + b"}", 400, None, "not JSON"),
    (COMPLETIONS, b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, 400, None, "not JSON"),
    (
        CHAT,
        messages(500_000),
        400,
        "messages",
        "context length is 512 tokens. However, you requested at least 500001 tokens",
    ),
    (CHAT, b'{"messages": [%s]}' % b", ".join([b"7"] * 500_000), 400, "messages", "at least 500001 tokens"),
    (CHAT, b'{"messages": [7, "%s"]}' % text(4 * MIB).encode(), 400, "messages", "messages.0"),
    (CHAT, messages(500, pad=text(MIB)), 400, "messages", "context length is 512 tokens"),
    (CHAT, body(messages=[{"role": "user", "content": text(4 * MIB)}]), 400, "messages", "you requested at least"),
    (CHAT, body(messages=[{"role": "user", "content": [7] * 500_000}]), 400, "messages", "parts should be"),
    (CHAT, body(messages=[{"role": text(4 * MIB)}]), 400, "messages", "messages.0.role"),
    (CHAT, messages(1, chat_template_kwargs={"x": [0] * 500_000}, n=129), 400, "n", "129"),
    ("/detokenize", body(tokens=["a"] * 500_000), 400, "tokens", "integer"),
    ("/detokenize", body(tokens=[5000] * 500_000), 400, "tokens", "5000 is not a token id"),
]


@pytest.mark.parametrize(
    ("path", "content", "status", "param", "said"), REFUSED, ids=[str(index) for index in range(len(REFUSED))]
)
def test_long_body_is_refused(path: str, content: bytes, status: int, param: str | None, said: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post(path, content=content)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error["message"][:300]
        assert said in error["message"]
        assert len(error["message"]) < 1000

    run(scenario)


def test_long_text_there_and_back() -> None:
    content = body(prompt=text(2 * MIB), return_token_strs=True)

    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post("/tokenize", content=content)
        tokens: dict[str, Any] = response.json()
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 2 * MIB
        half = body(tokens=tokens["tokens"][:MIB])
        response = await cluster.client.post("/detokenize", content=half)
        assert response.json() == {"prompt": text(MIB)}

    run(scenario)


@pytest.mark.parametrize("streaming", [False, True])
def test_as_many_prompts_as_there_may_be_requests(streaming: bool) -> None:
    content = body(prompt=["a" * 60] * 500, max_tokens=2, stream=streaming, return_token_ids=True)

    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post(COMPLETIONS, content=content)
        assert response.status_code == 200
        assert streaming or len(response.json()["choices"]) == 500

    run(scenario)


NUM_PROMPTS = 800
MANY = [[7]] * NUM_PROMPTS
BIASES = {str(token_id): 1.5 for token_id in range(1024)}


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": BIASES},
        {"stop": ["a" * 1023 + chr(ord("b") + index) for index in range(16)]},
        {"stop_token_ids": list(range(1024))},
        {"logprobs": 20, "max_tokens": 8},
        {"return_token_ids": True, "echo": True, "prompt": [[7] * 500] * NUM_PROMPTS},
        {"prompt": MANY[: NUM_PROMPTS // 100], "n": 100, "logit_bias": BIASES},
    ],
    ids=["logit_bias", "stop", "stop_token_ids", "logprobs", "echo", "n"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_long_fields_of_many_prompts(fields: dict[str, object], streaming: bool) -> None:
    content = body(**{"prompt": MANY, "max_tokens": 2, "seed": 0, "stream": streaming, **fields})

    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post(COMPLETIONS, content=content)
        assert response.status_code == 200, response.text[:300]
        if streaming:
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert len(response.json()["choices"]) == NUM_PROMPTS

    run(scenario, max_queued_requests=NUM_PROMPTS)


def test_long_answers_of_many_choices() -> None:
    content = body(
        messages=[{"role": "user", "content": "hi"}],
        **{"n": 100, "max_tokens": 200, "logprobs": True, "top_logprobs": 20},
    )

    async def scenario(cluster: FakeCluster) -> None:
        response = await cluster.client.post(CHAT, content=content)
        choices = response.json()["choices"]
        assert [len(choice["logprobs"]["content"]) for choice in choices] == [200] * 100

    run(scenario)


def test_many_prompts_of_a_client_that_leaves() -> None:
    content = body(prompt=MANY, max_tokens=400, logit_bias=BIASES)

    async def scenario(cluster: FakeCluster) -> None:
        asked = asyncio.create_task(cluster.client.post(COMPLETIONS, content=content))
        await until(lambda: len(cluster.service.machine.requests) == NUM_PROMPTS)
        asked.cancel()
        await until(lambda: not len(cluster.service.machine.requests))

    run(scenario, pace_s=60.0, max_queued_requests=NUM_PROMPTS)
