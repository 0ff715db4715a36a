"""HTTP client for a running cluster: readiness, status, timelines, chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from kvrelay.errors import KVRelayError
from kvrelay.protocol.ids import ROUTER

_TIMEOUT = httpx.Timeout(5.0, read=600.0)


class ClusterUnreachableError(KVRelayError):
    """No kvrelay router answers at that address."""

    code = "cluster_unreachable"


class ClusterClient:
    """One cluster, by the base URL of its router: the clients', or the operators' with their ``key`` if there is one.

    Raises ClusterUnreachableError if nothing answers, KVRelayError with the router's words if it refuses.
    """

    def __init__(self, url: str, *, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT, transport=transport, trust_env=False)
        self.url = url

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def not_ready_because(self) -> str | None:
        """Return why the cluster cannot serve now, or None if it can."""
        try:
            response = self._http.get("/ready", timeout=2.0)
        except httpx.TransportError:
            return "the router does not answer yet"
        return None if response.is_success else _error_text(response)

    def status(self) -> dict[str, Any]:
        """Return ``/cluster``: nodes, their load, requests."""
        return self._get("/cluster")

    def requests(self, count: int) -> list[dict[str, Any]]:
        """Return the newest ``count`` requests of the router, newest first; only operators may ask."""
        found: list[dict[str, Any]] = self._get(f"/cluster/requests?limit={count}")["requests"]
        return found

    def timeline(self, request_id: str) -> dict[str, Any]:
        """Return the timeline of one request."""
        return self._get(f"/cluster/requests/{quote(request_id, safe='')}")

    def drain(self, node: str, *, stay_down: bool = False) -> None:
        """Have ``node`` finish its requests and end. It is started again by its ``kvrelay up`` unless ``stay_down``."""
        try:
            response = self._http.post(f"/cluster/nodes/{quote(node, safe='')}/{'stop' if stay_down else 'drain'}")
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise KVRelayError(_error_text(response))

    def dump(self, name: str, *, prompts: bool) -> list[dict[str, str]]:
        """Have a node and its messager, or the ``router``, write their recordings; return the files.

        Each has ``process``, and ``path`` on its host or ``error``; the other of the two is empty.
        """
        path = "/cluster/dump" if name == ROUTER else f"/cluster/nodes/{quote(name, safe='')}/dump"
        try:
            response = self._http.post(path, params={"prompts": "true"} if prompts else {})
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise KVRelayError(_error_text(response))
        files: list[dict[str, str]] = response.json()["files"]
        return files

    def cancel(self, request_id: str) -> list[dict[str, str]]:
        """Cancel a request by its client's id; return ``request_id`` and last ``state`` of each choice."""
        try:
            response = self._http.delete(f"/cluster/requests/{quote(request_id, safe='')}")
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise KVRelayError(_error_text(response))
        cancelled: list[dict[str, str]] = response.json()["requests"]
        return cancelled

    def reset_prefix_cache(self) -> list[dict[str, Any]]:
        """Have all nodes forget their prefix caches; return ``name``, ``state`` and ``blocks`` of each.

        Some may not have done it (``state`` is not "reset").
        """
        try:
            response = self._http.post("/reset_prefix_cache", timeout=None)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        nodes: list[dict[str, Any]] | None = _json_object(response).get("nodes")
        if nodes is None:
            raise KVRelayError(_error_text(response))
        return nodes

    def chat(self, messages: list[dict[str, str]], *, max_tokens: int) -> Iterator[tuple[str, str]]:
        """Stream the answer to ``messages`` as (request id, new text) pairs."""
        body = {"model": self._model(), "messages": messages, "max_tokens": max_tokens, "stream": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    raise KVRelayError(_error_text(response))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _new_text(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _model(self) -> str:
        return str(self._get("/v1/models")["data"][0]["id"])

    def _get(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        body = _json_object(response)
        if response.is_success and body:
            return body
        if response.is_success or (response.status_code == httpx.codes.NOT_FOUND and "error" not in body):
            raise ClusterUnreachableError(f"the server at {self.url} is not a kvrelay router: it has no {path}")
        raise KVRelayError(_error_text(response))

    def _unreachable(self, error: httpx.TransportError) -> ClusterUnreachableError:
        return ClusterUnreachableError(
            f"no answer from {self.url} ({error}); start a cluster with 'kvrelay up CONFIG', or give the address of "
            "another one, http://HOST:PORT: to status and chat as the first argument, to other commands with --url"
        )


def _new_text(chunk: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the text in one chunk of a stream. Raises KVRelayError if the chunk is an error."""
    if "error" in chunk:
        raise KVRelayError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        yield chunk["id"], choice["delta"].get("content") or ""


def _error_text(response: httpx.Response) -> str:
    """Return the message of an error response of any format."""
    body = _json_object(response)
    error = body.get("error", body) or f"{response.status_code} {response.reason_phrase}"
    return str(error.get("message") or error.get("reason") or error) if isinstance(error, dict) else str(error)


def _json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in ``response``, or an empty one."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
