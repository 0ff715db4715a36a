"""``kvrelay up``: a whole cluster on this host."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from kvrelay.addresses import listen_at
from kvrelay.admin_key import read_admin_key
from kvrelay.cluster.addresses import require_free_addresses
from kvrelay.cluster.child import ProcessSpec
from kvrelay.cluster.client import ClusterClient
from kvrelay.cluster.display import Display
from kvrelay.cluster.supervisor import Supervisor
from kvrelay.cluster.tables import nodes_table
from kvrelay.config.cluster_config import OVERRIDES, ClusterConfig
from kvrelay.errors import KVRelayError
from kvrelay.runtime.listening import CONNECTION_BACKLOG
from kvrelay.runtime.logging import resolved_format
from kvrelay.runtime.runtime_dir import VARIABLE, runtime_dir
from kvrelay.runtime.stop_signals import STOP_SIGNALS, handle_stop_signals, ignore_stop_signals

AfterReady = Callable[[Supervisor, Display], Awaitable[None]]
"""Called when the cluster is ready."""


async def up(
    config: ClusterConfig, path: Path, overrides: Sequence[str], console: Console, after_ready: AfterReady | None = None
) -> int:
    """Run the cluster of ``config``, read from ``path`` with ``overrides``, until a signal; return the exit code.

    The processes write to pipes: ``cluster.log_format: auto`` goes by the ``console``.

    Raises ConfigError if one of its addresses is taken or is not this host's.
    """
    require_free_addresses(config)
    # Connections that come while the router restarts wait in the kernel for the next one.
    listener = listen_at(config.router.host, config.router.port, CONNECTION_BACKLOG)
    specs = process_specs(config, path, listener.fileno())
    log_format = resolved_format(config.cluster.log_format, is_terminal=console.is_terminal)
    display = Display(console, [spec.name for spec in specs], as_json=log_format == "json")

    async def probe() -> str | None:
        return await asyncio.to_thread(readiness.not_up_because)

    async def on_ready() -> None:
        display.show(nodes_table(readiness.status))
        display.say(f"ready: {config.router.url}/v1 serves {config.model.name}")
        if after_ready is not None:
            await after_ready(supervisor, display)

    with ClusterClient(config.router.admin_url, key=read_admin_key(config.router.admin_key_file)) as client:
        readiness = Readiness(client, [node.name for node in config.nodes])
        supervisor = Supervisor(
            specs, config.cluster, display, probe=probe, on_ready=on_ready, on_stopping=listener.close
        )
        handle_stop_signals(asyncio.get_running_loop(), supervisor.stop, (*STOP_SIGNALS, signal.SIGHUP))
        try:
            with runtime_dir() as directory, closing(display), listener:
                return await supervisor.run(process_env(directory, overrides, log_format=log_format))
        finally:
            ignore_stop_signals()


class Readiness:
    """Tells whether a cluster is up: its router can serve, and every node of the config is registered."""

    def __init__(self, client: ClusterClient, nodes: Sequence[str]) -> None:
        self._client = client
        self._nodes = nodes
        self.status: dict[str, Any] = {}
        """The status of the cluster when it was asked for last."""

    def not_up_because(self) -> str | None:
        """Return why the cluster is not up, or None if it is. A router that ends meanwhile is a reason to wait."""
        reason = self._client.not_ready_because()
        if reason is not None:
            return reason
        try:
            self.status = self._client.status()
        except KVRelayError as error:
            return str(error)
        there = {node["name"] for node in self.status["nodes"]}
        missing = [name for name in self._nodes if name not in there]
        return f"{', '.join(missing)} not registered yet" if missing else None


def process_specs(config: ClusterConfig, path: Path, listener: int | None = None) -> list[ProcessSpec]:
    """Return the processes of a cluster: the router, which listens at the socket ``listener``, then each node."""
    command = (sys.executable, "-P", "-m", "kvrelay.cluster")
    router = ProcessSpec("router", "router", (*command, "router", str(path)), listener, config.faults)
    nodes = (
        ProcessSpec(node.name, node.role, (*command, node.role, str(path), "--node", node.name), faults=node.faults)
        for node in config.nodes
    )
    return [router, *nodes]


def process_env(
    directory: Path, overrides: Sequence[str], env: Mapping[str, str] = os.environ, *, log_format: str | None = None
) -> dict[str, str]:
    """Return the environment of the processes. It has ``overrides``, which may contain passwords."""
    texts = [*json.loads(env.get(OVERRIDES, "[]")), *overrides]
    if log_format is not None:
        texts.append(f"cluster.log_format={log_format}")
    return {**env, VARIABLE: str(directory), OVERRIDES: json.dumps(texts), "PYTHONUNBUFFERED": "1"}
