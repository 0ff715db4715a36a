"""Golden tokens of transformers over HTTP in float32: from one node, from two, and from a CPU and the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from golden.cases import CASES, Golden, load_golden

from gpu_check.cluster_room import BLOCK, Room
from gpu_check.jobs import Ask
from gpu_check.processes import Cluster
from kvrelay.config.sections import LINK_KINDS

HEARTBEATS_S = 5.0
START_S = 45.0
"""Patience for all clusters, which start at once, or for each of them."""


class Nodes(NamedTuple):
    """A cluster for golden tokens: sections of its nodes by name, and the links that may have moved their KV."""

    what: str
    sections: dict[str, dict[str, Any]]
    links: tuple[str, ...] = ()


def check_goldens(room: Room) -> None:
    """Compare tokens of several clusters with those of transformers. What is wrong is in ``room.failures``."""
    case = next(case for case in CASES if case.name == "qwen3")
    path = room.folder / "golden"
    case.write_checkpoint(path)
    goldens = list(load_golden(case))
    sections = {
        "model": {"path": str(path), "served_name": "golden", "dtype": "float32"},
        "cache": {"block_size": BLOCK, "num_blocks": 512},
        "scheduler": {"max_num_seqs": 8},
    }
    clusters = ((nodes, room.start(f"golden {nodes.what}", nodes.sections, sections)) for nodes in _nodes(room))
    for nodes, cluster in list(clusters) if room.starts_at_once else clusters:
        room.attempt(partial(_check, room, nodes, cluster, goldens))


def _nodes(room: Room) -> Iterator[Nodes]:
    here, cpu = {"engine": room.engine()}, {"engine": room.engine("cpu")}
    yield Nodes("mixed", {"m0": {"role": "mixed", **here}})
    cuda = {"transfer": {"link": "cuda"}, **here}
    yield Nodes("P and D, cuda link", {"p0": {"role": "prefill", **cuda}, "d0": {"role": "decode", **cuda}}, ("cuda",))
    host = "ipc", "shm"
    yield Nodes("P on a CPU", {"p0": {"role": "prefill", **cpu}, "d0": {"role": "decode", **here}}, host)
    yield Nodes("D on a CPU", {"p0": {"role": "prefill", **here}, "d0": {"role": "decode", **cpu}}, host)


def _check(room: Room, nodes: Nodes, cluster: Cluster, goldens: Sequence[Golden]) -> None:
    try:
        cluster.wait_until_up(START_S * room.context.patience)
        asks = [Ask(golden.prompt_token_ids, len(golden.output_token_ids)) for golden in goldens]
        found = [answer.token_ids for load in (asks, *([ask] for ask in asks)) for answer in room.ask(cluster, load)]
        wanted = [golden.output_token_ids for golden in goldens] * 2
        right = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        links = _links(cluster) if nodes.links else set()
        note = "at once, then one by one" + f"; link {' '.join(links)}" * bool(nodes.links)
        room.add(f"golden tokens in float32, {nodes.what}", f"{right}/{len(found)}", "", None, note)
        assert right == len(found), f"golden tokens, {nodes.what}: {right} of {len(found)}"
        assert bool(links) == bool(nodes.links) and links <= set(nodes.links), f"{nodes.what}: link {links}"
        cluster.stop()
    finally:
        cluster.kill()


def _links(cluster: Cluster) -> set[str]:
    """Return the kinds of link that P has opened, as of a heartbeat that tells of one."""
    until_s = time.monotonic() + HEARTBEATS_S
    while True:
        counters = cluster.counters("p0")
        links: set[str] = {kind for kind in LINK_KINDS if counters.get(f"links_{kind}")}
        if links or time.monotonic() > until_s:
            return links
        time.sleep(0.1)
