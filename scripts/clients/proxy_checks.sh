# Sourced by `nginx` and `haproxy`: the checks of a reverse proxy at $PROXY in front of the router at $URL.

proxy_config() { # proxy_config LANGUAGE: the configuration in this language that docs/operations.md has
    sed -n "/^\`\`\`$1\$/,/^\`\`\`\$/{/^\`\`\`/d;p}" "$root/docs/operations.md"
}

proxy_checks() {
    packages openai httpx
    client "$PROXY" <<'PYTHON'
import asyncio
import json
import sys
import time
import urllib.request

import httpx
from client_checks import ANSWER, MESSAGES, URL, equal, ok
from openai import AsyncOpenAI

PROXY = sys.argv[1]
OPTIONS = {"model": "demo", "messages": MESSAGES, "temperature": 0}
LONG = {"model": "demo", "prompt": "The red key", "max_tokens": 4000, "ignore_eos": True, "stream": True}


def requests() -> dict[str, int]:
    """Return the router's requests by status."""
    with urllib.request.urlopen(URL + "/cluster") as answer:
        return json.load(answer)["requests"]


async def aborted(before: int) -> None:
    """Wait until the router has aborted a request more."""
    end = time.monotonic() + 20
    while (found := await asyncio.to_thread(requests))["aborted"] == before:
        if time.monotonic() > end:
            raise SystemExit(f"the request was not aborted: {found}")
        await asyncio.sleep(0.02)


async def streams(client: AsyncOpenAI) -> None:
    """Ask 16 times at once; each stream must come in parts."""

    async def one() -> list[str]:
        stream = await client.chat.completions.create(**OPTIONS, stream=True)
        return [part.choices[0].delta.content or "" async for part in stream]

    for parts in await asyncio.gather(*(one() for _ in range(16))):
        equal("streamed", "".join(parts), ANSWER)
    ok("16 streams at once")


async def unbuffered(client: httpx.AsyncClient) -> None:
    """Read a stream whose rest is still being computed; leave it."""
    before = requests()
    async with client.stream("POST", "/v1/completions", json=LONG) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                break
        now = requests()
        equal("requests that have ended", now["finished"], before["finished"])
        equal("requests that run", now["running"], 1)
    ok("a stream is not buffered")
    await aborted(before["aborted"])
    ok("a client that leaves ends its request")


async def keep_alive(client: httpx.AsyncClient) -> None:
    """Send requests one after the other; all must come through one connection."""
    ports = set()
    for _ in range(20):
        answer = await client.post("/v1/chat/completions", json=OPTIONS)
        answer.raise_for_status()
        ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
    equal("connections", len(ports), 1)
    ok("20 requests through one connection")


async def large(client: httpx.AsyncClient) -> None:
    """Send a body of 8 MB: it must be the router that refuses it, for its number of tokens."""
    answer = await client.post("/v1/completions", json={"model": "demo", "prompt": [5] * 4_000_000})
    equal("status", answer.status_code, 400)
    assert "max_model_len" in answer.text or "4096" in answer.text, answer.text[:500]
    ok("a body of 8 MB reaches the router")


async def main() -> None:
    async with AsyncOpenAI(base_url=PROXY + "/v1", api_key="any", max_retries=0) as client:
        whole = await client.chat.completions.create(**OPTIONS)
        equal("text", whole.choices[0].message.content, ANSWER)
        await streams(client)
    async with httpx.AsyncClient(base_url=PROXY, limits=httpx.Limits(max_connections=1), timeout=60) as client:
        await keep_alive(client)
        await large(client)
        await unbuffered(client)


asyncio.run(main())
PYTHON
}
