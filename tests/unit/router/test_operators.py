"""The operators' HTTP server: what only it has, and whom it lets in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_nodes import clients_app, config, register
from pydantic import SecretStr
from starlette.types import ASGIApp

import kvrelay
from kvrelay.addresses import is_loopback, is_named
from kvrelay.admin_key import VARIABLE, read_admin_key
from kvrelay.errors import ConfigError
from kvrelay.machine.clock import Clock
from kvrelay.machine.contract import Received
from kvrelay.protocol.ids import RequestId, peer_id
from kvrelay.protocol.request import SamplingParams
from router.events import CacheResetEnded, CacheResetRequested, DrainRequested, NewRequest, NodeReset, Submitted
from router.http.operators import OperatorsOnly, make_operators_app
from router.model import load_model
from router.service import RouterService

KEY = "correct-horse-battery"


class Service(RouterService):
    """With one node, and without sockets: what is posted to the machine is kept."""

    def __init__(self) -> None:
        settings = config("mixed")
        super().__init__(settings, load_model(settings), Clock())
        self.machine.handle(Received(peer_id("n0", "a1b2"), register("n0", "mixed", "a1b2")), 0.0)
        self.posted: list[object] = []

    def _post(self, event: object) -> None:
        self.posted.append(event)


def ask(app: ASGIApp, method: str, path: str, **headers: str) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(scenario())


def node_in(response: httpx.Response) -> dict[str, Any]:
    (node,) = response.json()["nodes"]
    assert isinstance(node, dict)
    return node


def test_only_operators_learn_where_nodes_are_and_which_start_of_them_runs() -> None:
    service = Service()
    clients = ask(clients_app(service), "GET", "/cluster")
    operators = ask(make_operators_app(service), "GET", "/cluster")
    assert node_in(operators).keys() - node_in(clients).keys() == {"address", "pid", "incarnation"}
    assert node_in(operators)["incarnation"] == "a1b2"
    assert "a1b2" not in clients.text


@pytest.mark.parametrize(("action", "stay_down"), [("drain", False), ("stop", True)])
def test_a_node_is_drained_by_operators_and_not_by_clients(action: str, stay_down: bool) -> None:
    service = Service()
    path = f"/cluster/nodes/n0/{action}"
    assert ask(clients_app(service), "POST", path).status_code == 404
    assert service.posted == []
    assert ask(make_operators_app(service), "POST", path).status_code == 202
    assert service.posted == [DrainRequested("n0", stay_down)]  # type: ignore[arg-type]
    unknown = ask(make_operators_app(service), "POST", f"/cluster/nodes/other/{action}")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


class Answering(Service):
    """Nodes answer a reset at once as ``states`` say."""

    def __init__(self, *states: str) -> None:
        super().__init__()
        self._nodes = tuple(NodeReset(f"n{index}", state, index) for index, state in enumerate(states))  # type: ignore[arg-type]

    def _post(self, event: object) -> None:
        assert isinstance(event, CacheResetRequested)
        self._reset_ended(CacheResetEnded(event.reset, self._nodes))


def test_a_reset_of_the_prefix_caches_tells_what_became_of_it_on_each_node() -> None:
    done = ask(make_operators_app(Answering("reset", "reset")), "POST", "/reset_prefix_cache")
    nodes = [{"name": "n0", "state": "reset", "blocks": 0}, {"name": "n1", "state": "reset", "blocks": 1}]
    assert (done.status_code, done.json()) == (200, {"status": "reset", "nodes": nodes})
    partly = ask(make_operators_app(Answering("reset", "no_answer", "lost")), "POST", "/flush_cache")
    assert (partly.status_code, partly.json()["error"]["code"]) == (503, "reset_incomplete")
    assert partly.json()["error"]["message"].endswith(": n1, n2")
    assert [node["state"] for node in partly.json()["nodes"]] == ["reset", "no_answer", "lost"]


def test_the_info_for_operators_has_the_config_and_no_secret() -> None:
    service = Service()
    secrets = {"registry": {"url": "redis://user:hush-registry@host/0"}, "storage": {"url": "redis://:hush-store@host"}}
    tracing = {"otlp_endpoint": "http://user:hush-traces@collector:4318/v1?token=hush-token"}
    config = service.config
    service.config = config.model_copy(
        update={
            "registry": config.registry.model_copy(update={"url": SecretStr(secrets["registry"]["url"])}),
            "storage": config.storage.model_copy(update={"url": SecretStr(secrets["storage"]["url"])}),
            "router": config.router.model_copy(update=tracing),
        }
    )
    app = make_operators_app(service)
    info = ask(app, "GET", "/server_info")
    assert "hush" not in info.text
    found = info.json()["kvrelay_config"]
    assert found["router"]["otlp_endpoint"] == "http://collector:4318/v1"
    assert found["cache"] == config.cache.model_dump(mode="json")
    text = ask(app, "GET", "/get_server_info?config_format=text").json()
    assert json.loads(text["kvrelay_config"]) == found and text["version"] == kvrelay.__version__
    wrong = ask(app, "GET", "/server_info?config_format=xml")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_request_error")


def test_the_load_is_the_number_of_requests_in_progress() -> None:
    service = Service()
    app = clients_app(service)
    assert ask(app, "GET", "/load").json() == {"server_load": 0}
    requests = tuple(NewRequest(RequestId(name), [1], SamplingParams(max_tokens=2, seed=0)) for name in "abc")
    service.machine.handle(Submitted(requests), 0.0)
    assert ask(app, "GET", "/load").json() == {"server_load": 3}


@pytest.mark.parametrize("given", ["", f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", "Bearer ÿ", KEY])
def test_without_the_key_nobody_is_let_in(given: str) -> None:
    app = OperatorsOnly(make_operators_app(Service()), KEY)
    response = ask(app, "GET", "/cluster", **({"Authorization": given.encode("latin-1")} if given else {}))  # type: ignore[arg-type]
    assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_with_the_key_or_where_there_is_none_they_are() -> None:
    app = make_operators_app(Service())
    assert ask(OperatorsOnly(app, KEY), "GET", "/cluster", Authorization=f"bearer {KEY}").status_code == 200
    assert ask(OperatorsOnly(app, None), "GET", "/cluster").status_code == 200


def test_a_page_in_an_operators_browser_is_not_let_in() -> None:
    service = Service()
    app = OperatorsOnly(make_operators_app(service), None)
    response = ask(app, "POST", "/cluster/nodes/n0/drain", Origin="http://evil.example")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    assert service.posted == []


def test_a_name_that_points_to_this_host_is_not_let_in_without_a_key() -> None:
    app = make_operators_app(Service())
    response = ask(OperatorsOnly(app, None), "GET", "/cluster", Host="evil.example:8090")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    with_key = {"Authorization": f"Bearer {KEY}", "Host": "router.example:8090"}
    assert ask(OperatorsOnly(app, KEY), "GET", "/cluster", **with_key).status_code == 200


@pytest.mark.parametrize(
    ("location", "is_it"),
    [("127.0.0.1", False), ("127.0.0.1:8090", False), ("[::1]:8090", False), ("[::1]", False),
     ("LOCALHOST:8090", False), ("", False), ("10.0.0.1:80", False), ("evil.example", True),
     ("evil.example:8090", True), ("127.0.0.1.nip.io", True), ("localhost.evil.example", True), ("[evil]:1", True)],
)  # fmt: skip
def test_what_has_a_name(location: str, is_it: bool) -> None:
    assert is_named(location) is is_it


# ---------------------------------------------------------------- the key


def test_the_key_comes_from_the_file_or_else_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_admin_key(str(file), {VARIABLE: "another-key-of-others"}) == KEY
    assert read_admin_key(None, {VARIABLE: f" {KEY}\n"}) == KEY
    assert read_admin_key(None, {}) is None


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words in a key file", b"\xff" * 20, "ключ-ключ-ключ-ключ".encode()]
)
def test_a_file_without_a_key_is_refused_without_quoting_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^router\.admin_key_file: ") as caught:
        read_admin_key(str(file), {})
    assert not content or content.decode("utf-8", "replace") not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_admin_key(str(tmp_path / "missing"), {})


def test_beyond_loopback_a_key_is_a_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    router = config(admin_host="0.0.0.0").router
    with pytest.raises(ConfigError, match=r"router\.admin_host: 0\.0\.0\.0 is not loopback"):
        OperatorsOnly.of(router, make_operators_app(Service()))
    monkeypatch.setenv(VARIABLE, KEY)
    OperatorsOnly.of(router, make_operators_app(Service()))


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("router.example", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it


def test_the_port_follows_the_clients_unless_it_is_set() -> None:
    assert config(port=8000).router.admin_address == ("127.0.0.1", 8090)
    assert config(port=65500).router.admin_address == ("127.0.0.1", 65410)
    assert config(admin_port=7, admin_host="::1").router.admin_url == "http://[::1]:7"
    assert config(port=8000, host="::").router.admin_url == "http://[::1]:8090"
