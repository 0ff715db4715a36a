"""API keys of clients: who gets in, the limits of each key, and TLS. Nothing shows a key."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path

import httpx
import pytest
from fake_nodes import FakeCluster, Script, fake_cluster, until

from kvrelay.config.sections import RouterConfig
from kvrelay.errors import ConfigError
from router.http.api_keys import VARIABLE, ApiKey, ApiKeys, parse_api_keys
from router.http.key_limits import KeyUse
from router.http.server import tls_files

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
BODY = {"model": "demo", "prompt": "Hello", "max_tokens": 4, "temperature": 0}


def write_keys(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["# the clients", "", *lines]))
    return str(path)


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    return write_keys(tmp_path / "keys", f"alice {ALICE}", f"bob sha256:{digest}")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(cluster: FakeCluster, key: str | None = ALICE, **fields: object) -> httpx.Response:
    headers = {} if key is None else bearer(key)
    return await cluster.client.post("/v1/completions", json=BODY | fields, headers=headers)


# ---------------------------------------------------------------- who gets in


@pytest.mark.parametrize("key", [ALICE, BOB])
def test_a_client_with_a_key_is_served(keys_file: str, key: str) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            answer = await ask(cluster, key)
            assert answer.status_code == 200
            assert "x-ratelimit-limit-requests" not in answer.headers

    asyncio.run(check())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("wrong"),
        bearer(ALICE + "x"),
        bearer(ALICE.upper()),
        {"Authorization": ALICE},
        bearer("é" * 9),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions/"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("GET", "/metrics"),
        ("GET", "/cluster"),
        ("GET", "/cluster/requests/x"),
        ("GET", "/nowhere"),
    ],
)
def test_without_a_valid_key_it_is_401_in_openais_format(
    keys_file: str, method: str, path: str, headers: dict[str, str]
) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            answer = await cluster.client.request(
                method, path, headers=encoded, json=BODY if method == "POST" else None
            )
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
            assert "wrong" not in answer.text
            assert ALICE not in answer.text

    asyncio.run(check())


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez", "/ping", "/ready", "/readyz", "/ready/"])
def test_probes_need_no_key(keys_file: str, path: str) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            assert (await cluster.client.get(path)).status_code == 200

    asyncio.run(check())


MESSAGE = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": ALICE},
        {"x-api-key": ALICE, "Authorization": "Bearer nobody"},
        {"x-api-key": "nobody", **bearer(ALICE)},
    ],
    ids=["alone", "with another token", "wrong with a right token"],
)
def test_a_key_may_be_in_the_header_of_anthropics_clients(keys_file: str, headers: dict[str, str]) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            for path, body in (("/v1/messages", MESSAGE), ("/v1/completions", BODY)):
                assert (await cluster.client.post(path, json=body, headers=headers)).status_code == 200

    asyncio.run(check())


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "nobody"}, {"x-api-key": ""}])
def test_without_a_valid_key_it_is_401_in_anthropics_format(keys_file: str, headers: dict[str, str]) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            answer = await cluster.client.post("/v1/messages", json=MESSAGE, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == "authentication_error"

    asyncio.run(check())


def test_a_web_pages_preflight_needs_no_key_and_401_can_be_read_by_the_page(keys_file: str) -> None:
    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file, cors_allow_origins=["http://page"]) as cluster:
            headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
            assert (await cluster.client.options("/v1/completions", headers=headers)).status_code == 200
            answer = await cluster.client.post("/v1/completions", json=BODY, headers={"Origin": "http://page"})
            assert answer.status_code == 401
            assert answer.headers["access-control-allow-origin"] == "http://page"

    asyncio.run(check())


# ---------------------------------------------------------------- the file


def test_a_changed_file_counts_without_a_restart_and_a_damaged_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "keys", [100.0]
    keys = ApiKeys.of(RouterConfig(api_keys_file=write_keys(path, f"alice {ALICE}")), lambda: now[0], env={})
    assert keys is not None
    assert keys.find(ALICE)
    for content, valid in [(f"bob {BOB}", BOB), ("bob", BOB), (f"alice {ALICE}", ALICE)]:
        write_keys(path, content)
        os.utime(path, ns=(0, int(now[0] * 1e9)))
        now[0] += 2
        assert [secret for secret in (ALICE, BOB) if keys.find(secret)] == [valid]
    path.unlink()
    now[0] += 2
    assert keys.find(ALICE)
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


def test_a_file_that_takes_the_place_of_another_counts_whatever_its_time(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [100.0]
    keys = ApiKeys.of(RouterConfig(api_keys_file=write_keys(path, f"alice {ALICE}")), lambda: now[0], env={})
    assert keys is not None
    new = Path(write_keys(tmp_path / "new", f"bob {BOB}"))
    os.utime(new, ns=(0, path.stat().st_mtime_ns))
    new.replace(path)
    now[0] += 2
    assert [secret for secret in (ALICE, BOB) if keys.find(secret)] == [BOB]


def test_keys_from_the_environment() -> None:
    keys = ApiKeys.of(RouterConfig(), lambda: 0.0, env={VARIABLE: f"alice {ALICE} requests=2\nbob {BOB}"})
    assert keys is not None
    assert keys.find(ALICE) == ApiKey("alice", hashlib.sha256(ALICE.encode()).digest(), max_requests=2)
    assert ApiKeys.of(RouterConfig(), lambda: 0.0, env={}) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("alice", "keys:1: should read NAME KEY"),
        (f"alice {ALICE} speed=3", "keys:1: should read NAME KEY"),
        (f"alice {ALICE} requests=many", "keys:1: should read NAME KEY"),
        ("alice sha256:abc", "keys:1: should read NAME KEY"),
        (f"a/b {ALICE}", "keys:1: should read NAME KEY"),
        (f"alice {ALICE}\nalice {BOB}", "keys:2: alice has the name or the key of an earlier line"),
        (f"alice {ALICE}\nbob {ALICE}", "keys:2: bob has the name or the key of an earlier line"),
        ("# none", "keys: no keys"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_keys(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_api_keys(text, "keys", RouterConfig())
    assert reason in str(caught.value)
    assert ALICE not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.api_keys_file: cannot read"):
        ApiKeys.of(RouterConfig(api_keys_file=str(tmp_path / "none")), lambda: 0.0, env={})


def test_limits_of_a_line_go_before_those_of_the_config() -> None:
    config = RouterConfig(key_max_requests=5, key_tokens_per_minute=100)
    [alice, bob] = parse_api_keys(f"alice {ALICE} requests=2\nbob {BOB} tokens_per_minute=7", "keys", config)
    assert (alice.max_requests, alice.tokens_per_minute) == (2, 100)
    assert (bob.max_requests, bob.tokens_per_minute) == (5, 7)


# ---------------------------------------------------------------- limits


def test_more_requests_at_once_than_a_key_may_have_are_429_and_end_with_the_others(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", f"alice {ALICE} requests=2", f"bob {BOB}")

    async def check() -> None:
        async with fake_cluster(Script(pace_s=0.01), api_keys_file=path) as cluster:
            running = [asyncio.create_task(ask(cluster, max_tokens=100)) for _ in range(2)]
            await until(lambda: len(cluster.service.machine.requests) == 2)
            refused = await ask(cluster)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["x-ratelimit-limit-requests"] == "2"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert (await ask(cluster, BOB)).status_code == 200
            for answer in await asyncio.gather(*running):
                assert answer.status_code == 200
            last = await ask(cluster)
            assert (last.status_code, last.headers["x-ratelimit-remaining-requests"]) == (200, "1")

    asyncio.run(check())


def test_a_client_that_leaves_gives_its_place_back(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", f"alice {ALICE} requests=1")

    async def check() -> None:
        async with fake_cluster(Script(pace_s=0.01), api_keys_file=path) as cluster:
            for _ in range(3):
                body = BODY | {"stream": True, "max_tokens": 400}
                async with cluster.client.stream("POST", "/v1/completions", json=body, headers=bearer(ALICE)) as answer:
                    assert answer.status_code == 200
                await until(lambda: not cluster.service.machine.requests)
            assert (await ask(cluster)).status_code == 200

    asyncio.run(check())


def test_tokens_beyond_those_of_a_minute_are_429_with_the_wait(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", f"alice {ALICE} tokens_per_minute=20", f"bob {BOB}")

    async def check() -> None:
        async with fake_cluster(api_keys_file=path) as cluster:
            first = await ask(cluster, max_tokens=40)
            assert first.status_code == 200
            used = first.json()["usage"]["total_tokens"]
            assert used > 20
            refused = await ask(cluster)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 0 < int(refused.headers["retry-after"]) <= (used - 20 + 1) * 3 + 1
            assert refused.headers["x-ratelimit-limit-tokens"] == "20"
            assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
            assert refused.headers["x-ratelimit-reset-tokens"].endswith("s")
            assert (await ask(cluster, BOB)).status_code == 200

    asyncio.run(check())


def test_a_request_that_is_refused_costs_no_tokens(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", f"alice {ALICE} tokens_per_minute=1000", f"bob {BOB}")

    async def check() -> None:
        async with fake_cluster(Script(pace_s=0.01), api_keys_file=path, max_queued_requests=1) as cluster:
            running = asyncio.create_task(ask(cluster, BOB, max_tokens=50))
            await until(lambda: len(cluster.service.machine.requests) == 1)
            for _ in range(2):
                refused = await ask(cluster)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
                assert refused.headers["x-ratelimit-remaining-tokens"] == "1000"
            assert (await running).status_code == 200

    asyncio.run(check())


def test_tokens_become_available_evenly() -> None:
    key, use = ApiKey("a", b"", tokens_per_minute=60), KeyUse(0.0)
    assert use.wait_s(key, 0.0) == 0
    use.charge(90)
    assert use.wait_s(key, 0.0) == pytest.approx(31)
    assert use.wait_s(key, 30.0) == pytest.approx(1)
    assert use.wait_s(key, 31.5) == 0
    assert dict(use.headers(key, 60.0))[b"x-ratelimit-remaining-tokens"] == b"30"
    assert dict(use.headers(key, 1000.0))[b"x-ratelimit-reset-tokens"] == b"0.000s"


def test_the_log_names_the_key_and_does_not_show_it(keys_file: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def check() -> None:
        async with fake_cluster(api_keys_file=keys_file) as cluster:
            answer = await ask(cluster)
            await ask(cluster, "sk-wrong-key")
            for path in ("/metrics", "/cluster", f"/cluster/requests/{answer.json()['id']}"):
                shown = (await cluster.client.get(path, headers=bearer(ALICE))).text
                assert ALICE not in shown

    asyncio.run(check())
    assert ALICE not in caplog.text
    assert "sk-wrong-key" not in caplog.text
    assert ALICE not in repr(parse_api_keys(f"alice {ALICE}", "keys", RouterConfig()))


# ---------------------------------------------------------------- TLS


def test_answers_and_streams_over_tls(certificate: tuple[str, str]) -> None:
    async def check() -> None:
        async with fake_cluster(tls_certificate=certificate[0], tls_key=certificate[1]) as cluster:
            assert cluster.url.startswith("https://")
            assert (await ask(cluster, None)).status_code == 200
            async with cluster.client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            with pytest.raises(httpx.RemoteProtocolError):
                await cluster.client.get(cluster.url.replace("https", "http") + "/health")
            assert (await cluster.client.get("/health")).status_code == 200

    asyncio.run(check())


def test_certificate_and_key_that_do_not_fit_are_refused_at_the_start(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    for tls_certificate, tls_key in [(certificate[0], certificate[0]), (str(tmp_path / "none"), certificate[1])]:
        with pytest.raises(ConfigError, match=r"router\.tls_certificate, tls_key: "):
            tls_files(RouterConfig(tls_certificate=tls_certificate, tls_key=tls_key))
    assert tls_files(RouterConfig()) is None
