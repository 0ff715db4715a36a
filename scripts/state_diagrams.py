"""Prints docs/state-machines.md, made from the transition tables."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from cache_messager import expectation, transfer
from decode_node import request as decode_request
from prefill_node import request as prefill_request
from router import request as router_request

HEAD = """# State machines

Made from the transition tables in the code by `scripts/state_diagrams.py`; a test keeps this page equal to them.
A status changes by one call, `Lifecycle.move` (`kvrelay/machine/lifecycle.py`),
which raises for a step that is not drawn here. On nodes that call is made by `RequestTable.move`
(`kvrelay/node/request_table.py`) alone, which moves the request to the container of its new status too.
"""


class Machine(NamedTuple):
    """One table with its title, and the file it is in."""

    title: str
    file: str
    table: Mapping[StrEnum, frozenset[StrEnum]]
    first: tuple[StrEnum, ...]


def machines() -> list[Machine]:
    """Return all tables there are."""
    decode = decode_request.DecodeStatus
    return [
        Machine(
            "A request in the router", "router/request.py", router_request.TRANSITIONS, (router_request.Status.WAITING,)
        ),
        Machine(
            "A request on a prefill node",
            "prefill_node/request.py",
            prefill_request.TRANSITIONS,
            (prefill_request.PrefillStatus.QUEUED,),
        ),
        Machine(
            "A request on a decode or mixed node",
            "decode_node/request.py",
            decode_request.TRANSITIONS,
            (decode.RESERVING, decode.WAITING),
        ),
        Machine(
            "A transfer in P's messager",
            "cache_messager/transfer.py",
            transfer.TRANSITIONS,
            (transfer.TransferStatus.PENDING,),
        ),
        Machine(
            "Expected KV in D's messager",
            "cache_messager/expectation.py",
            expectation.TRANSITIONS,
            (expectation.ExpectationStatus.RECEIVING,),
        ),
    ]


def diagram(machine: Machine) -> str:
    """Return the Mermaid diagram of one table."""
    lines = [f"    [*] --> {status.value}" for status in machine.first]
    for status, followers in machine.table.items():
        lines += [f"    {status.value} --> {follower.value}" for follower in sorted(followers)]
        if not followers:
            lines.append(f"    {status.value} --> [*]")
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def page() -> str:
    """Return the page."""
    parts = [f"## {machine.title}\n\n`{machine.file}`\n\n{diagram(machine)}\n" for machine in machines()]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    print(page(), end="")
