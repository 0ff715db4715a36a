"""Whole clusters of real processes on the card as a client sees them, over HTTP.

Golden tokens first, while the large model loads; then one mixed node; then a prefill and a decode node that share the
card, so that waiting for the other's time slice is part of their figures. The most important rows come first.
"""

from __future__ import annotations

import contextlib
import importlib.util
from functools import partial

from gpu_check.context import Context

NEEDED = {
    "annotated_types": "annotated-types",
    "httptools": "httptools",
    "httpx": "httpx",
    "jinja2": "jinja2",
    "msgpack": "msgpack",
    "prometheus_client": "prometheus-client",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "rich": "rich",
    "setproctitle": "setproctitle",
    "starlette": "starlette",
    "tokenizers": "tokenizers",
    "typer": "typer",
    "typing_inspection": "typing-inspection",
    "uvicorn": "uvicorn",
    "uvloop": "uvloop",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
"""What router, nodes and messagers import beside what the other parts need, with the name of its package."""


def run(context: Context) -> None:
    """Check and measure all; raises AssertionError with what failed, after everything has been tried."""
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        print(f"## cluster: skipped, missing: {' '.join(missing)}. Name a folder with their wheels with --wheels")
        return
    from gpu_check.cluster_golden import check_goldens  # noqa: PLC0415
    from gpu_check.cluster_loads import MODELS, measure_disaggregated, measure_mixed  # noqa: PLC0415
    from gpu_check.cluster_room import Room  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        room = Room(context, stack)
        first, *others = MODELS
        started = room.attempt(lambda: room.start_mixed(first)) if room.starts_at_once else None
        room.attempt(lambda: check_goldens(room))
        room.attempt(lambda: measure_mixed(room, first, started or room.start_mixed(first)))
        room.attempt(lambda: measure_disaggregated(room, first))
        for name in others:
            room.attempt(partial(lambda name: measure_mixed(room, name, room.start_mixed(name)), name))
    assert not room.failures, room.failures
