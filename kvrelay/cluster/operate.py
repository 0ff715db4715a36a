"""``kvrelay drain``, ``restart``, ``cancel``, ``dump`` and ``reset-prefix-cache``: what operators do to a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvrelay.cluster.client import ClusterClient, ClusterUnreachableError
from kvrelay.errors import KVRelayError

_POLL_S = 0.2


def drain(cluster: ClusterClient, node: str, *, stay_down: bool, timeout_s: float, say: Callable[[str], None]) -> None:
    """Drain ``node`` and wait until it has left. Raises KVRelayError if it is unknown or does not leave in time."""
    started = _incarnation(cluster, node)
    if started is None:
        raise KVRelayError(f"no node is called {node!r}")
    cluster.drain(node, stay_down=stay_down)
    say(f"{node} drains")
    _wait(lambda: _incarnation(cluster, node) != started, f"{node} has not left", timeout_s)
    say(f"{node} has left")


def cancel(cluster: ClusterClient, request_id: str, *, say: Callable[[str], None]) -> None:
    """Cancel a request. Raises KVRelayError if none of that id is in progress."""
    for request in cluster.cancel(request_id):
        say(f"{request['request_id']} cancelled, it was {request['state']}")


def dump(cluster: ClusterClient, name: str, *, prompts: bool, say: Callable[[str], None]) -> None:
    """Have a node, or the router, write its recording. Raises KVRelayError if it is unknown or a file is missing."""
    files = cluster.dump(name, prompts=prompts)
    for file in files:
        say(f"{file['process']}: {file['path'] or file['error']}")
    if not all(file["path"] for file in files):
        raise KVRelayError("not every recording was written")


def reset_prefix_cache(cluster: ClusterClient, *, say: Callable[[str], None]) -> None:
    """Have all nodes forget their prefix caches. Raises KVRelayError if one has not, or has not answered."""
    nodes = cluster.reset_prefix_cache()
    for node in sorted(nodes, key=lambda node: str(node["name"])):
        say(f"{node['name']} {node['state'].replace('_', ' ')}, {node['blocks']} blocks")
    if any(node["state"] != "reset" for node in nodes):
        raise KVRelayError("not all prefix caches are reset")


def restart(cluster: ClusterClient, nodes: list[str], *, timeout_s: float, say: Callable[[str], None]) -> None:
    """Restart ``nodes``, or all if there are none, one after another, by draining each and waiting until it is back.

    Their supervisor starts them again. Raises KVRelayError if one is not back in time; the later ones are left alone.
    """
    status = cluster.status()
    there = sorted(node["name"] for node in status["nodes"])
    missing = [] if nodes else [node["name"] for node in status.get("missing_nodes", [])]
    if missing:
        say(f"left out, since not registered: {', '.join(missing)}")
    for name in nodes or there:
        started = _incarnation(cluster, name)
        if started is None:
            raise KVRelayError(f"no node is called {name!r}")
        cluster.drain(name)
        say(f"{name} drains")
        _wait(
            lambda name=name, started=started: _is_back(cluster, name, started),  # type: ignore[misc]
            f"{name} is not back",
            timeout_s,
        )
        say(f"{name} is back")


def _incarnation(cluster: ClusterClient, name: str) -> str | None:
    """Return which start of the node is registered, or None."""
    return next((node["incarnation"] for node in cluster.status()["nodes"] if node["name"] == name), None)


def _is_back(cluster: ClusterClient, name: str, started: str) -> bool:
    found = next((node for node in cluster.status()["nodes"] if node["name"] == name), None)
    return found is not None and found["incarnation"] != started and found["state"] == "ready"


def _wait(condition: Callable[[], bool], otherwise: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not _holds(condition):
        if time.monotonic() > deadline_s:
            raise KVRelayError(f"{otherwise} within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _holds(condition: Callable[[], bool]) -> bool:
    """Return whether ``condition`` holds; a router that does not answer for a while is asked again."""
    try:
        return condition()
    except ClusterUnreachableError:
        return False
