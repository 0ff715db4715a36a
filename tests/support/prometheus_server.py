"""A real Prometheus for tests: Debian's package ``prometheus``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.ports import free_ports

STOP_S = 60.0
ANSWER_S = 60.0


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S, trust_env=False)

    def _get(self, path: str, **params: str) -> Any:
        """Return the data of an answer; None while the server does not answer."""
        try:
            answer = self._client.get(path, params=params)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == httpx.codes.OK else None

    def targets(self) -> dict[str, tuple[str, str]]:
        """Return health and last error of each target by its address."""
        data = self._get("/api/v1/targets") or {"activeTargets": []}
        return {its["labels"]["instance"]: (its["health"], its["lastError"]) for its in data["activeTargets"]}

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series that ``query`` finds now."""
        data = self._get("/api/v1/query", query=query) or {"result": []}
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def unhealthy_rules(self) -> list[str]:
        """Return what is wrong with rules that have been evaluated; a line for each that has not been."""
        groups = (self._get("/api/v1/rules") or {"groups": [{"rules": []}]})["groups"]
        rules = [rule for group in groups for rule in group["rules"]] or [{"name": "rules", "health": "unknown"}]
        return [f"{its['name']}: {its.get('lastError', its['health'])}" for its in rules if its["health"] != "ok"]

    def close(self) -> None:
        """Close the connection to it."""
        self._client.close()


@contextmanager
def prometheus(directory: Path, targets: Sequence[str], rules: Path) -> Iterator[Prometheus]:
    """Run a server that scrapes ``targets`` (HOST:PORT) every second. Skips the test if there is none here."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian: the package prometheus)")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "kvrelay", "static_configs": [{"targets": list(targets)}]}],
    }
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    arguments = [f"--config.file={path}", f"--storage.tsdb.path={directory}/data"]
    log = (directory / "prometheus.log").open("wb")
    process = subprocess.Popen(
        [binary, *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
    )
    server = Prometheus(port)
    try:
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(STOP_S)
        log.close()
