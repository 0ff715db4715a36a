"""``scripts/demo``: starts a cluster, streams one answer and prints the timeline of its request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from kvrelay.addresses import resolve, tcp_address
from kvrelay.cluster.addresses import addresses, taken_addresses
from kvrelay.cluster.client import ClusterClient
from kvrelay.cluster.display import Display
from kvrelay.cluster.process import name_process, refuse_foreign_packages
from kvrelay.cluster.supervisor import Supervisor
from kvrelay.cluster.tables import timeline_table
from kvrelay.cluster.terminal import PlainConsole
from kvrelay.cluster.up import AfterReady, up
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import ConfigError, KVRelayError
from kvrelay.runtime.stop_signals import exit_on_stop_signals

_QUESTION = (
    "The red key lies in box 417. The blue lamp stands in room 9. The old map hides behind door 58. "
    "The red cup is on shelf 230. The golden ring waits at gate 7. No, the red key is in drawer 86. "
    "Where is the red key?"
)
_MAX_TOKENS = 64
_TINY_MODEL = Path(".kvrelay/models/tiny")
_TIMELINE_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.1


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=Path("configs/1p3d.yaml"), help="config of another cluster than 1P3D"
    )
    parser.add_argument("--exit", action="store_true", help="stop the cluster after the answer")
    arguments = parser.parse_args()
    exit_on_stop_signals()
    name_process("demo")
    console = PlainConsole()
    try:
        refuse_foreign_packages()
        config, overrides = _runnable(arguments.config, console)
        show = _shown_once(config, console, ends=arguments.exit)
        return asyncio.run(up(config, arguments.config, overrides, console, show))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def _shown_once(config: ClusterConfig, console: Console, *, ends: bool) -> AfterReady:
    """Return the callback for a ready cluster: it shows one request and, if ``ends``, stops the cluster."""

    async def show(supervisor: Supervisor, display: Display) -> None:
        with display.held():
            await asyncio.to_thread(_show_one_request, config.router.url, console)
        if ends:
            supervisor.stop()
        else:
            display.say(f"Ctrl-C ends it; to talk to it, in another terminal: {_command()} chat {config.router.url}")

    return show


def _command() -> str:
    """Return the command of this Python's ``kvrelay`` for a new shell in this directory."""
    path = Path(sys.executable).with_name("kvrelay")
    on_path = shutil.which("kvrelay")
    if on_path is not None and Path(on_path) == path:
        return "kvrelay"
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _runnable(path: Path, console: Console) -> tuple[ClusterConfig, list[str]]:
    """Return the config with overrides that make it runnable here: a model, and free ports."""
    config = ClusterConfig.load(path)
    overrides = []
    if not (Path(config.model.path) / "config.json").is_file():
        overrides.append(f"model.path={_tiny_model(config.model.path, console)}")
    overrides += _other_ports(config, console)
    overrides.append("cluster.log_format=text")  # it is for people
    return ClusterConfig.load(path, overrides), overrides


def _tiny_model(wanted: str, console: Console) -> Path:
    from kvrelay.engine.tiny import write_tiny_checkpoint  # noqa: PLC0415 - only where there is no model

    if not (_TINY_MODEL / "config.json").is_file():
        write_tiny_checkpoint(_TINY_MODEL, "qwen3", 0)
    console.print(f"no model in {wanted}; creating a tiny one with random weights: its output is meaningless")
    return _TINY_MODEL.absolute()


def _other_ports(config: ClusterConfig, console: Console) -> list[str]:
    """Return overrides that replace the ports by free ones, or none if the configured ones are free."""
    taken = taken_addresses(config)
    if not taken:
        return []
    for key, problem in taken.items():
        console.print(f"{key}: {problem}; using other ports")
    wanted = addresses(config)
    hosts = [host for host, _ in wanted.values()]
    free = dict(zip(wanted, zip(hosts, _free_ports(hosts), strict=True), strict=True))
    return [
        f"{key}={tcp_address(host, port) if key == 'router.control' else port}" for key, (host, port) in free.items()
    ]


def _free_ports(hosts: list[str]) -> list[int]:
    """Return a different free port for each of ``hosts``."""
    with contextlib.ExitStack() as probes:
        return [probes.enter_context(_bound(host, 0)).getsockname()[1] for host in hosts]


def _bound(host: str, port: int) -> socket.socket:
    family, address = resolve(host, port)
    probe = socket.socket(family)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(address)
    except OSError:
        probe.close()
        raise
    return probe


def _show_one_request(url: str, console: Console) -> None:
    """Ask the question, stream the answer and print the timeline. Raises KVRelayError if the request fails."""
    console.print(f"\n> {_QUESTION}", style="bold")
    with ClusterClient(url) as client:
        timeline = _whole_timeline(client, _stream_answer(client, console))
    console.print("\n")
    console.print(timeline_table(timeline))
    per_layer = {layer["num_bytes"] for layer in timeline["layers"]}
    each = f", {per_layer.pop():,} bytes per layer" if len(per_layer) == 1 else ""
    console.print(f"KV moved: {timeline['kv_bytes_moved']:,} bytes in {len(timeline['layers'])} layers{each}\n")


def _stream_answer(client: ClusterClient, console: Console) -> str:
    """Print the answer as it comes; return the request's id."""
    request_ids = set()
    for request_id, text in client.chat([{"role": "user", "content": _QUESTION}], max_tokens=_MAX_TOKENS):
        request_ids.add(request_id)
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    (request_id,) = request_ids
    return request_id


def _whole_timeline(client: ClusterClient, request_id: str) -> dict[str, Any]:
    """Return the timeline when every node has reported its part, which may be after the end of the answer."""
    deadline_s = time.monotonic() + _TIMELINE_TIMEOUT_S
    while not _is_whole(timeline := client.timeline(request_id)):
        if time.monotonic() > deadline_s:
            raise KVRelayError(f"the nodes have not reported on {request_id}")
        time.sleep(_POLL_INTERVAL_S)
    return timeline


def _is_whole(timeline: dict[str, Any]) -> bool:
    """Return whether the node that finished the request has reported and, after a hand-off, the prefill node too."""
    by_nodes = {mark["name"] for mark in timeline["marks"] if mark["node"] != "router"}
    return "done" in by_nodes and ("handed_off" not in by_nodes or "transferred" in by_nodes)


if __name__ == "__main__":
    sys.exit(main())
