"""Real clusters under load while everything in them is killed, stopped, drained and restarted. See ``scripts/soak``.

``.venv/bin/python tests/soak.py [--minutes 10] [--seed 0] [--out .kvrelay/soak]``: a round for each shape (1P3D,
2P2D), without a store, and with Redis as the store and the registry. Every answer must have exactly the expected
tokens or be one typed error; connections may be cut only if a router ends, and are never refused. It writes
``soak.json``, the log of each round and, with matplotlib (``kvrelay[bench]``), ``soak.png`` (memory and descriptors
of each process over time). It ends with 1 if an answer is wrong or missing, or if something is held in the end of a
round.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import uvloop
from support.chaos import Chaos
from support.cluster import Cluster, assert_ended_well, running
from support.cluster_config import VOCAB_SIZE, Config, cluster_config, d, fake_engine, p
from support.redis_server import RedisServer, redis_server
from support.soak_clients import Client
from support.soak_tally import Tally

from kvrelay.bench.errors import BenchError
from kvrelay.bench.plot import require_matplotlib
from kvrelay.engine.tiny import write_tiny_checkpoint

SHAPES = {"1P3D": [p("p0"), d("d0"), d("d1"), d("d2")], "2P2D": [p("p0"), p("p1"), d("d0"), d("d1")]}
BACKENDS = ("none", "redis")
CLIENTS = 12
NUM_BLOCKS = 48
"""Blocks of each node: so few that requests are preempted."""

FAULTS = {
    "messages": {"*": {"delay": 0.02, "duplicate": 0.01}, "KVFrame": {"corrupt": 0.005, "delay": 0.02}},
    "store_delay_rate": 0.05,
    "store_delay_s": 0.5,
}
COLOURS = {"router": "tab:red", "prefill": "tab:blue", "decode": "tab:green", "messager": "tab:orange", "up": "black"}


def round_config(model: Path, shape: str, redis: RedisServer | None, seed: int) -> Config:
    """Return the config of a round's cluster."""
    with_redis: Config = {}
    if redis is not None:
        with_redis = {
            "storage": {"backend": "redis", "url": redis.url, "ttl_s": 60},
            "registry": {"kind": "redis", "url": redis.url},
        }
    return cluster_config(
        model,
        *SHAPES[shape],
        engine=fake_engine(step_s=0.01),
        cache={"num_blocks": NUM_BLOCKS},
        transfer={"link": "tcp"},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        cluster={
            "peer_timeout_s": 3.0,
            "drain_timeout_s": 5.0,
            "max_crashes": 1000,
            "restart_backoff_max_s": 1.0,
        },
        faults={**FAULTS, "seed": seed},
        **with_redis,
    )


async def load(cluster: Cluster, chaos: Chaos, tally: Tally, seed: int, until_s: float) -> None:
    """Have all clients ask until ``until_s``."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=None, trust_env=False, limits=limits) as http:
        clients = [Client(cluster, http, tally, f"{seed} {number}", chaos.may_cut_since) for number in range(CLIENTS)]
        await asyncio.gather(*(client.run(until_s) for client in clients))


def soak_round(model: Path, shape: str, backend: str, seconds: float, seed: int, out: Path) -> Tally:
    """Run one cluster for ``seconds``."""
    tally = Tally(f"{shape}, store: {backend}")
    try:
        with (
            redirect_stdout(sys.stderr),  # a cluster prints the end of its log when it is closed
            redis_server() if backend == "redis" else nullcontext() as redis,
            running(round_config(model, shape, redis, seed)) as cluster,
        ):
            try:
                play_round(cluster, redis, tally, seconds, seed)
            finally:
                (out / f"soak-{shape}-{backend}.log").write_text(cluster.log())
    except AssertionError as error:
        traceback.print_exc()
        tally.failure = repr(error)
    return tally


def play_round(cluster: Cluster, redis: RedisServer | None, tally: Tally, seconds: float, seed: int) -> None:
    """Load ``cluster``, act on it and end it. Raises AssertionError if it is not at rest then, or something broke."""
    tally.began_s = time.monotonic()
    until_s = tally.began_s + seconds
    chaos = Chaos(cluster, redis, tally, seed, until_s)
    with chaos.running(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(load(cluster, chaos, tally, seed, until_s))
    cluster.wait_until_up()
    cluster.wait_until_quiescent()
    tally.sample(cluster)
    cluster.process.send_signal(signal.SIGTERM)
    assert_ended_well(cluster)
    tally.read_log(cluster.log())


def draw(path: Path, tallies: list[Tally]) -> None:
    """Write a PNG with the memory and the descriptors of each process, one round after the other."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for panel, column, label in zip(axes, (1, 2), ("RSS of a process, MiB", "descriptors of a process"), strict=True):
        for tally in tallies:
            began_s = tally.began_s - tallies[0].began_s
            panel.axvline(began_s / 60, color="lightgrey", linewidth=0.8)
            panel.text(began_s / 60, 1.01, f" {tally.name}", fontsize=8, transform=panel.get_xaxis_transform())
            for title, life in tally.lives.items():
                role = title.removeprefix("kvrelay ").split("#")[0].split()[0]
                times = [(began_s + sample[0]) / 60 for sample in life.samples]
                values = [sample[column] for sample in life.samples]
                panel.plot(times, values, color=COLOURS.get(role, "tab:grey"), linewidth=0.8)
        panel.set(xlabel="time, min", ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    for role, colour in COLOURS.items():
        axes[0].plot([], [], color=colour, label="kvrelay up" if role == "up" else role)
    axes[0].legend(fontsize=8, ncols=len(COLOURS), loc="lower center")
    figure.savefig(path, dpi=80)


def report(options: argparse.Namespace, tallies: list[Tally]) -> dict[str, Any]:
    """Return all figures, with the samples of each process."""
    return {
        "minutes": options.minutes,
        "seed": options.seed,
        "rounds": [tally.as_dict() for tally in tallies],
        "samples": {tally.name: {title: life.samples for title, life in tally.lives.items()} for tally in tallies},
    }


def main() -> int:
    """Run the soak test; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".kvrelay/soak"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rounds = list(itertools.product(SHAPES, BACKENDS))
    tallies = []
    with tempfile.TemporaryDirectory(prefix="kvsoak-") as directory:
        model = Path(directory) / "model"
        write_tiny_checkpoint(model, "qwen2", overrides={"vocab_size": VOCAB_SIZE})
        for number, (shape, backend) in enumerate(rounds):
            seconds = options.minutes * 60 / len(rounds)
            tallies.append(soak_round(model, shape, backend, seconds, options.seed + number, options.out))
            print(json.dumps(tallies[-1].as_dict()), flush=True)
            (options.out / "soak.json").write_text(json.dumps(report(options, tallies)))
    try:
        draw(options.out / "soak.png", tallies)
    except BenchError as error:
        print(f"no soak.png: {error}")
    return 0 if all(tally.is_good for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
