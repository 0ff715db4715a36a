"""Real clusters under load while their processes are killed, stopped and drained at random. See ``scripts/soak``.

``.venv/bin/python tests/soak.py [--minutes 10] [--seed 0] [--out DIR]``: a round for each shape (1P3D, 2P2D), with and
without a store. Every answer must have exactly the expected tokens or be one typed error. It writes ``soak.json`` and,
with matplotlib (``kvrelay[bench]``), ``soak.png`` (memory and descriptors over time). It ends with 1 if an answer is
wrong or missing, or if something is held in the end. The router is stopped too, but not killed: that cuts connections.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from support.asking import CONNECTION_LOST, Ask, Asker, play, random_prompt
from support.cluster import Cluster, running
from support.cluster_config import VOCAB_SIZE, cluster_config, d, fake_engine, p

from kvrelay.bench.errors import BenchError
from kvrelay.bench.plot import require_matplotlib
from kvrelay.engine.tiny import write_tiny_checkpoint

SHAPES = {"1P3D": [p("p0"), d("d0"), d("d1"), d("d2")], "2P2D": [p("p0"), p("p1"), d("d0"), d("d1")]}
CLIENTS = 8
LOST_S = 180.0
"""An answer that takes longer is lost."""

PAUSE_S = (1.0, 4.0)
"""Shortest and longest time from one event to the next."""

FAULTS = {
    "messages": {"*": {"delay": 0.02, "duplicate": 0.01}, "KVFrame": {"corrupt": 0.002, "delay": 0.02}},
    "store_delay_rate": 0.05,
    "store_delay_s": 0.5,
}


class Tally:
    """What has happened in one round."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.samples: list[dict[str, float]] = []
        self.longest_request_s = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "round": self.name,
            **{name: self.counts[name] for name in ("requests", "right", "wrong", "lost", "hung_up")},
            "errors": dict(self.errors),
            "events": dict(self.events),
            "retries": self.counts["retries"],
            "longest_request_s": round(self.longest_request_s, 2),
            "samples": self.samples,
        }

    @property
    def is_good(self) -> bool:
        lost_connections = self.errors[f"{CONNECTION_LOST[0]} {CONNECTION_LOST[1]}"]
        return not (self.counts["wrong"] or self.counts["lost"] or lost_connections)


class Chaos:
    """Does something to ``cluster`` at random, again and again, until it is stopped; samples memory meanwhile."""

    def __init__(self, cluster: Cluster, tally: Tally, seed: int) -> None:
        self._cluster = cluster
        self._tally = tally
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._started_s = time.monotonic()
        self._threads = [threading.Thread(target=self._act), threading.Thread(target=self._sample)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _act(self) -> None:
        events: list[Callable[[str], None]] = [
            self._kill,
            self._kill_messager,
            self._stop,
            self._stop_router,
            self._drain,
        ]
        names = [node.name for node in self._cluster.config.nodes]
        while not self._over.wait(self._rng.uniform(*PAUSE_S)):
            event = self._rng.choice(events)
            # What is being restarted is not registered, or its process is gone.
            with suppress(StopIteration, httpx.HTTPError, psutil.Error, ProcessLookupError, ValueError):
                event(self._rng.choice(names))
                self._tally.events[event.__name__.strip("_")] += 1

    def _kill(self, name: str) -> None:
        os.kill(self._cluster.pid(name), signal.SIGKILL)

    def _kill_messager(self, name: str) -> None:
        os.kill(self._cluster.messager_pid(name), signal.SIGKILL)

    def _stop(self, name: str) -> None:
        self._stop_for(self._cluster.pid(name))

    def _stop_router(self, _: str) -> None:
        self._stop_for(self._cluster.pid("router"))

    def _stop_for(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._over.wait(self._rng.uniform(0.5, 8.0))
        os.kill(pid, signal.SIGCONT)

    def _drain(self, name: str) -> None:
        self._cluster.admin.post(f"/cluster/nodes/{name}/drain").raise_for_status()

    def _sample(self) -> None:
        while not self._over.wait(1.0):
            sample = {"at_s": round(time.monotonic() - self._started_s, 1), "MiB": 0.0, "descriptors": 0.0}
            for pid in self._cluster.pids():
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    sample["MiB"] += process.memory_info().rss / (1 << 20)
                    sample["descriptors"] += process.num_fds()
            self._tally.samples.append(sample)


async def _client(cluster: Cluster, asker: Asker, tally: Tally, rng: random.Random, until_s: float) -> None:
    shared = random_prompt(random.Random(1), 64)
    while time.monotonic() < until_s:
        prompt = [*(shared if rng.random() < 0.3 else []), *random_prompt(rng, rng.randint(1, 200))]
        ask = Ask(prompt, rng.randint(1, 80), rng.choice([0.0, 0.9]), rng.getrandbits(31))
        tally.counts["requests"] += 1
        started_s = time.monotonic()
        if rng.random() < 0.05:
            with suppress(httpx.HTTPError, AssertionError, StopAsyncIteration, KeyError):
                await asyncio.wait_for(asker.hang_up(ask, 1), LOST_S)
            tally.counts["hung_up"] += 1
            continue
        try:
            answer = await asyncio.wait_for(asker.ask(ask), LOST_S)
        except TimeoutError:
            tally.counts["lost"] += 1
            print(f"{tally.name}: lost: {ask}", flush=True)
            continue
        tally.longest_request_s = max(tally.longest_request_s, time.monotonic() - started_s)
        if answer.end is not None:
            tally.errors[" ".join(map(str, answer.end))] += 1
        elif answer.token_ids == ask.expected(cluster.fake()):
            tally.counts["right"] += 1
        else:
            tally.counts["wrong"] += 1
            print(f"{tally.name}: wrong tokens: {ask}: {answer.body}", flush=True)


def soak_round(model: Path, shape: str, backend: str, seconds: float, seed: int) -> Tally:
    """Run one cluster for ``seconds``. Raises AssertionError if it is not at rest in the end, or does not end well."""
    tally = Tally(f"{shape}, store: {backend}")
    config = cluster_config(
        model,
        *SHAPES[shape],
        engine=fake_engine(step_s=0.002),
        cache={"num_blocks": 96},
        transfer={"link": "tcp"},
        scheduler={"reserve_policy": "none", "watermark": 0.0},
        storage={"backend": backend},
        cluster={"peer_timeout_s": 3.0, "drain_timeout_s": 10.0, "max_crashes": 1000},
        faults={**FAULTS, "seed": seed},
    )
    with redirect_stdout(sys.stderr), running(config) as cluster:  # it prints its log in the end
        until_s = time.monotonic() + seconds

        async def load(asker: Asker) -> None:
            rngs = [random.Random(f"{seed} {number}") for number in range(CLIENTS)]
            await asyncio.gather(*(_client(cluster, asker, tally, rng, until_s) for rng in rngs))

        with Chaos(cluster, tally, seed):
            play(cluster, load)
        cluster.wait_until_up()
        cluster.wait_until_quiescent()
        tally.counts["retries"] = cluster.status()["requests"]["retries"]
    return tally


def draw(path: Path, tallies: list[Tally]) -> None:
    """Write a PNG with the memory and the descriptors of all processes over the time of each round."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for panel, key in zip(axes, ("MiB", "descriptors"), strict=True):
        for tally in tallies:
            times = [sample["at_s"] for sample in tally.samples]
            panel.plot(times, [sample[key] for sample in tally.samples], label=tally.name)
        panel.set(xlabel="time, s", ylabel=f"{key}, all processes", ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=80)


def main() -> int:
    """Run the soak test; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    rounds = list(itertools.product(SHAPES, ("none", "memory")))
    tallies = []
    with tempfile.TemporaryDirectory(prefix="kvsoak-") as directory:
        model = Path(directory) / "model"
        write_tiny_checkpoint(model, "qwen2", overrides={"vocab_size": VOCAB_SIZE})
        for number, (shape, backend) in enumerate(rounds):
            tally = soak_round(model, shape, backend, options.minutes * 60 / len(rounds), options.seed + number)
            tallies.append(tally)
            print(json.dumps({**tally.as_dict(), "samples": len(tally.samples)}), flush=True)
    report = {"minutes": options.minutes, "seed": options.seed, "rounds": [tally.as_dict() for tally in tallies]}
    (options.out / "soak.json").write_text(json.dumps(report))
    try:
        draw(options.out / "soak.png", tallies)
    except BenchError as error:
        print(f"no soak.png: {error}")
    return 0 if all(tally.is_good for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
