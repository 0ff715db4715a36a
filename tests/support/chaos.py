"""Does something to the processes of a cluster at random, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from support.cluster import PATIENCE_S, Cluster
from support.redis_server import RedisServer
from support.soak_tally import Tally

PAUSE_S = (2.0, 12.0)
"""Shortest and longest time from the end of an event to the next of the same actor."""

ACTORS = 2
STOP_S = (0.3, 8.0)
"""Shortest and longest time that a process, or Redis, stands still or is away. A peer is lost after 3 s."""

SAMPLE_S = 2.0
LEAVING_S = 30.0
"""The router may cut connections for that long after it was told to end: it finishes its requests first."""

SPARED = ("d0", "router")
"""They are not ended in the second half of a round, so that their memory can be observed for some time."""


class Chaos:
    """Acts on ``cluster`` and ``redis`` until ``until_s`` and counts in ``tally``, which it also gives samples."""

    def __init__(self, cluster: Cluster, redis: RedisServer | None, tally: Tally, seed: int, until_s: float) -> None:
        self._cluster = cluster
        self._redis = redis
        self._tally = tally
        self._until_s = until_s
        self._half_s = (time.monotonic() + until_s) / 2
        self._over = threading.Event()
        self._redis_is_mine = threading.Lock()
        self._router_told_s: list[float] = []
        self._failure: BaseException | None = None
        self._events: dict[Callable[[random.Random], None], int] = {
            self._kill_node: 3,
            self._kill_messager: 2,
            self._terminate_node: 1,
            self._drain_node: 2,
            self._pause_process: 6,
            self._kill_router: 1,
            self._terminate_router: 1,
            self._rolling_restart: 1,
        }
        if redis is not None:
            self._events |= {self._kill_redis: 2, self._pause_redis: 2}
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._act, random.Random(f"{seed} {number}")))
            for number in range(ACTORS)
        ]
        self._threads.append(threading.Thread(target=self._guarded, args=(self._sample, None)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Act meanwhile. Raises what stopped an actor."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def may_cut_since(self, since_s: float) -> bool:
        """Return whether a router was about to end at any time from ``since_s`` on."""
        return any(told_s + LEAVING_S >= since_s for told_s in self._router_told_s)

    def _guarded(self, work: Callable[..., None], argument: object) -> None:
        try:
            work(argument)
        except BaseException as error:
            self._failure = error

    def _act(self, rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(*PAUSE_S)):
            [event] = rng.choices(list(self._events), list(self._events.values()))
            # What is being restarted is not registered, or its process is gone.
            with suppress(LookupError, httpx.HTTPError, psutil.Error, ProcessLookupError):
                event(rng)
                self._tally.events[event.__name__.strip("_")] += 1

    def _sample(self, _: object) -> None:
        while not self._over.wait(SAMPLE_S):
            with suppress(httpx.HTTPError):  # there is no router now
                self._tally.sample(self._cluster)

    # ------------------------------------------------------------ targets

    def _processes(self) -> dict[str, int]:
        """Return the pids by what ``ps`` shows without ``kvrelay``: ``decode d0``, ``messager d0``, ``router``, ..."""
        found = {}
        for pid in self._cluster.pids():
            with suppress(psutil.Error):
                role, *name = [*self._cluster.title(pid).split()[1:3], ""]
                found["up" if role == "up" else f"{role} {name[0]}".strip()] = pid
        return found

    def _is_spared(self, name: str) -> bool:
        return name in SPARED and time.monotonic() > self._half_s

    def _end(self, rng: random.Random, number: signal.Signals, *roles: str) -> None:
        """Send a signal to one process of ``roles``. Raises IndexError if there is none."""
        processes = self._processes()
        titles = [title for title in processes if title.split()[0] in roles]
        title = rng.choice([title for title in titles if not self._is_spared(title.split()[-1])])
        if title == "router":
            self._router_told_s.append(time.monotonic())
        os.kill(processes[title], number)

    # ------------------------------------------------------------ events

    def _kill_node(self, rng: random.Random) -> None:
        self._end(rng, signal.SIGKILL, "prefill", "decode")

    def _kill_messager(self, rng: random.Random) -> None:
        self._end(rng, signal.SIGKILL, "messager")

    def _terminate_node(self, rng: random.Random) -> None:
        self._end(rng, signal.SIGTERM, "prefill", "decode")

    def _kill_router(self, rng: random.Random) -> None:
        self._end(rng, signal.SIGKILL, "router")

    def _terminate_router(self, rng: random.Random) -> None:
        self._end(rng, signal.SIGTERM, "router")

    def _drain_node(self, rng: random.Random) -> None:
        name = rng.choice([node.name for node in self._cluster.config.nodes if not self._is_spared(node.name)])
        self._cluster.admin.post(f"/cluster/nodes/{name}/drain").raise_for_status()

    def _rolling_restart(self, _: random.Random) -> None:
        """Restart all nodes. It may fail: meanwhile nodes are killed, and so is the router."""
        if self._is_spared("d0"):
            raise LookupError
        command = [str(Path(sys.executable).with_name("kvrelay")), "restart", "--rolling", "--url"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, str(self._cluster.admin.base_url)], capture_output=True, timeout=PATIENCE_S, check=False
            )

    def _pause_process(self, rng: random.Random) -> None:
        """Have a process stand still, whichever: a node, a messager, the router, the supervisor."""
        pid = rng.choice(list(self._processes().values()))
        os.kill(pid, signal.SIGSTOP)
        self._over.wait(rng.uniform(*STOP_S))
        os.kill(pid, signal.SIGCONT)

    def _kill_redis(self, rng: random.Random) -> None:
        """Have Redis go, with all it held, and come back empty."""
        with self._redis_is_mine:
            assert self._redis is not None
            self._redis.kill()
            self._over.wait(rng.uniform(*STOP_S))
            self._redis.start()

    def _pause_redis(self, rng: random.Random) -> None:
        with self._redis_is_mine:
            assert self._redis is not None
            with self._redis.stopped():
                self._over.wait(rng.uniform(*STOP_S))
