"""The operators' page in a headless browser, and what serves it.

Needs Playwright and a Chromium: ``scripts/setup-browser`` installs both.
``KVRELAY_SCREENSHOTS=DIR`` keeps pictures of the page.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster, assert_ended_well, running, until
from support.cluster_config import cluster_config, d, fake_engine, p

PATIENCE_MS = 120_000
PHONE = {"width": 390, "height": 800}
SCREENSHOTS = os.environ.get("KVRELAY_SCREENSHOTS")


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    """1P2D. A node that is killed is not started again for a minute."""
    sections: dict[str, Any] = {"restart_backoff_s": 60.0, "restart_backoff_max_s": 60.0}
    engine = fake_engine(step_s=0.02)
    with running(cluster_config(model, p(), d("d0"), d("d1"), engine=engine, cluster=sections)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("browser"))}
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], env=env)
        except api.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def _page(browser: Any, cluster: Cluster, **options: Any) -> tuple[Any, list[str]]:
    """Open the dashboard; return the page and the list of what its console complains of."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(str(cluster.admin.base_url).rstrip("/") + "/dashboard")
    return page, complaints


def _shoot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        (Path(SCREENSHOTS) / f"{name}.png").write_bytes(page.screenshot(full_page=True))


def _serve(cluster: Cluster, count: int) -> None:
    for index in range(count):
        body = {"prompt": [7 + index] * 80, "max_tokens": 12, "ignore_eos": True}
        cluster.http.post("/v1/completions", json=body).raise_for_status()


def test_nodes_requests_a_timeline_and_a_node_that_is_killed(cluster: Cluster, browser: Any) -> None:
    _serve(cluster, 12)
    page, complaints = _page(browser, cluster, viewport={"width": 1100, "height": 900})

    page.wait_for_selector(".node.ready[data-node=d1]")
    assert page.locator(".node.ready").count() == 3
    assert page.locator("#ready").inner_text() == "ready"
    until("all requests are listed", lambda: page.locator("#requests tr").count() == 12)
    assert page.locator("#login").is_hidden()
    assert re.search(r"12\s*finished", page.locator("#counts").inner_text())
    assert page.locator(".flow.moving").count() <= 2  # what moved a moment ago

    page.locator("#requests tr button").first.click()
    page.wait_for_selector("#timeline .phase.prefill")
    page.wait_for_selector("#timeline .phase.decode")
    page.wait_for_selector("#timeline .phase.transfer")
    _shoot(page, "dashboard-light")
    page.emulate_media(color_scheme="dark")
    _shoot(page, "dashboard-dark")

    [pid] = [node["pid"] for node in cluster.admin.get("/cluster").json()["nodes"] if node["name"] == "d1"]
    os.kill(pid, signal.SIGKILL)
    page.wait_for_selector(".node.lost[data-node=d1]")
    red = page.evaluate("getComputedStyle(document.querySelector('.node.lost')).borderLeftColor")
    assert red == "rgb(248, 113, 113)"
    assert page.locator(".node.ready").count() == 2
    _shoot(page, "dashboard-lost-node")

    fresh, more = _page(browser, cluster)  # which has never seen it alive
    fresh.wait_for_selector(".node.lost[data-node=d1]")
    assert complaints + more == []  # neither errors nor anything that the policy refused


def test_movement_shows_while_requests_are_served(cluster: Cluster, browser: Any) -> None:
    page, complaints = _page(browser, cluster)
    page.wait_for_selector(".node[data-node=p0]")

    decoding = [node["pid"] for node in cluster.admin.get("/cluster").json()["nodes"] if node["role"] == "decode"]
    body = {"prompt": [9] * 60, "max_tokens": 8, "ignore_eos": True, "stream": True}
    for pid in decoding:
        os.kill(pid, signal.SIGSTOP)  # so that the request stays where it is
    try:
        with cluster.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())  # the first token comes from p0
            page.wait_for_selector(".flow.moving", state="attached")
            until("its state is shown", lambda: "decode" in page.locator("#requests").inner_text())
    finally:
        for pid in decoding:
            os.kill(pid, signal.SIGCONT)
    assert complaints == []


def test_a_phone_shows_it_without_scrolling_sideways(cluster: Cluster, browser: Any) -> None:
    _serve(cluster, 2)
    page, complaints = _page(browser, cluster, viewport=PHONE)
    page.wait_for_selector("#requests tr")

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    _shoot(page, "dashboard-phone")
    assert complaints == []


def test_the_page_asks_for_a_key_where_there_is_one(model: Path, browser: Any, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("correct-horse-battery\n")
    key_file.chmod(0o600)
    config = cluster_config(model, p(), d(), engine=fake_engine(), router={"admin_key_file": str(key_file)})
    cluster = Cluster(config)
    cluster.admin.headers["Authorization"] = "Bearer correct-horse-battery"
    try:
        cluster.start()
        cluster.wait_until_up()
        page, _ = _page(browser, cluster)
        page.wait_for_selector("#login:not([hidden])")
        assert page.locator(".node").count() == 0
        page.fill("#key", "correct-horse-battery")
        page.press("#key", "Enter")
        page.wait_for_selector(".node.ready[data-node=d0]")
        until("the form is hidden", page.locator("#login").is_hidden)
        cluster.process.send_signal(signal.SIGTERM)
        assert_ended_well(cluster)
    finally:
        cluster.close()


def test_the_page_uses_nothing_from_outside_and_runs_only_itself(cluster: Cluster) -> None:
    response = cluster.admin.get("/dashboard")

    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\s\"')]+", response.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\s(src|href|style|on\w+)=", response.text)
    assert cluster.http.get("/dashboard").status_code == 404
    page = cluster.admin.get("/dashboard", headers={"Origin": "http://evil.example"})
    assert page.status_code == 403
