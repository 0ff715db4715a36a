"""Clients that people use: curl, and the openai package in all its ways."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from support.cluster import Cluster

pytestmark = [pytest.mark.timeout(300), pytest.mark.parametrize("real_cluster", ["qwen2"], indirect=True)]

PROMPT = "once upon a time"
MESSAGES: list[openai.types.chat.ChatCompletionUserMessageParam] = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def client(real_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{real_cluster.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]

    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0)
    chat = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=20, temperature=0)

    assert completion.choices[0].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 20
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content
    assert chat.choices[0].finish_reason in ("stop", "length")


def test_openai_client_streaming(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0)
    whole_chat = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=20, temperature=0)

    parts = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, stream=True)
    text = "".join(part.choices[0].text for part in parts)
    deltas = list(
        client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    assert text == whole.choices[0].text
    said = "".join(choice.delta.content or "" for part in deltas for choice in part.choices)
    assert said == whole_chat.choices[0].message.content
    assert deltas[0].choices[0].delta.role == "assistant"
    assert deltas[-1].usage == whole_chat.usage


def test_openai_client_asynchronous(real_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    async def talk() -> tuple[list[str], str, str | None]:
        async with openai.AsyncOpenAI(base_url=f"{real_cluster.url}/v1", api_key="any", max_retries=0) as client:
            jobs = (
                client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0) for _ in range(4)
            )
            texts = [completion.choices[0].text for completion in await asyncio.gather(*jobs)]
            stream = await client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=20, temperature=0, stream=True
            )
            said = "".join([part.choices[0].delta.content or "" async for part in stream])
            chat = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=20, temperature=0)
            return texts, said, chat.choices[0].message.content

    texts, said, whole = asyncio.run(talk())

    assert len(set(texts)) == 1
    assert said == whole


def test_openai_client_sees_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="demo", prompt=[5] * 100_000)

    assert unknown.value.code == "model_not_found"
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.param == "prompt"
    assert "This model's maximum context length is" in str(too_long.value)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl(real_cluster: Cluster) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 8}
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--noproxy",
        "*",
        f"{real_cluster.url}/v1/chat/completions",
    ]
    header = ["-H", "Content-Type: application/json", "-d"]

    whole = subprocess.run([*command, *header, json.dumps(body)], check=True, capture_output=True)
    stream = subprocess.run(
        [*command, "--no-buffer", *header, json.dumps({**body, "stream": True})], check=True, capture_output=True
    )

    assert json.loads(whole.stdout)["choices"][0]["message"]["role"] == "assistant"
    events = stream.stdout.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
