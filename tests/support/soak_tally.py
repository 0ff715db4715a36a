"""What a round of ``tests/soak.py`` counts, and the memory and descriptors of each process over time."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import psutil

from support.cluster import Cluster

MIN_LIFE_S = 120.0
"""A process that lived shorter has no slope."""

WARM_UP_S = 60.0
"""The first part of a process's life, which counts for no slope."""

OUTCOMES = ("right", "wrong", "lost", "refused", "failed", "cancelled", "hung_up")
"""What may become of a request. ``failed``: one typed error; ``lost``: no answer in time, or cut without a reason."""

_NEVER = ("wrong", "lost", "refused")
_NODE_COUNTERS = (
    "preemptions",
    "frames_written",
    "corrupt_frames",
    "stale_frames",
    "kv_blocks_loaded",
    "store_timeouts",
)
_ROUTER_COUNTERS = ("retries", "moved", "nodes_lost", "decode_refusals")
_ENDING = re.compile(r"exited with \d+|was killed by \w+")
_BROKEN = ("Traceback", "self-check failed", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")


class Totals:
    """Sums of counters that begin again at 0 with each process."""

    def __init__(self) -> None:
        self._last: dict[object, Mapping[str, float]] = {}

    def observe(self, process: object, counters: Mapping[str, float]) -> None:
        """Take the counters of a process as they are now."""
        self._last[process] = counters

    def total(self, name: str) -> int:
        """Return the sum over all processes, each as of its last observation."""
        return int(sum(counters.get(name, 0) for counters in self._last.values()))


class Life:
    """One process: its samples are (seconds since the begin of the round, MiB, descriptors)."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, int]] = []

    @property
    def seconds(self) -> float:
        """Seconds from the first sample to the last."""
        return self.samples[-1][0] - self.samples[0][0]

    def slope_mib_per_hour(self) -> float:
        """Return the slope of the line that fits the memory best, after the warm-up."""
        times, mib, _ = np.array([sample for sample in self.samples if sample[0] >= self.samples[0][0] + WARM_UP_S]).T
        return float(np.polyfit(times, mib, 1)[0] * 3600)

    def as_dict(self, title: str) -> dict[str, Any]:
        """Return the figures of a long life."""
        return {
            "process": title,
            "lived_s": round(self.seconds),
            "first_MiB": round(self.samples[0][1], 1),
            "last_MiB": round(self.samples[-1][1], 1),
            "last_descriptors": self.samples[-1][2],
            "MiB_per_hour": round(self.slope_mib_per_hour(), 1),
        }


class Tally:
    """What has happened in one round."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = 0
        self.tokens = 0
        self.cut = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.gaps_s: list[float] = []
        self.longest_request_s = 0.0
        self.failure: str | None = None
        self.lives: dict[str, Life] = {}
        self.began_s = time.monotonic()
        self._router = Totals()
        self._nodes = Totals()

    def sample(self, cluster: Cluster) -> None:
        """Look at the processes of ``cluster``, and at their counters if the router answers."""
        router = None
        for pid in cluster.pids():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                title = " ".join(cluster.title(pid).split()[:3])
                if title.startswith("kvrelay "):
                    sample = (
                        round(time.monotonic() - self.began_s, 1),
                        round(process.memory_info().rss / (1 << 20), 1),
                        process.num_fds(),
                    )
                    self.lives.setdefault(f"{title}#{pid}", Life()).samples.append(sample)
                    router = pid if title == "kvrelay router" else router
        status = cluster.status()
        self._router.observe(router, status["requests"])
        for node in status["nodes"]:
            self._nodes.observe(node["pid"], node["load"]["counters"])

    def read_log(self, log: str) -> None:
        """Count how processes ended. Raises AssertionError if something broke in them."""
        self.endings.update(_ENDING.findall(log))
        broken = [word for word in _BROKEN if word in log]
        assert not broken, f"{self.name}: the log has {broken}"

    def as_dict(self) -> dict[str, Any]:
        """Return all figures but the samples."""
        stalls_s = sorted(self.gaps_s)
        return {
            "round": self.name,
            "failure": self.failure,
            "requests": self.requests,
            "tokens": self.tokens,
            "cut_and_asked_again": self.cut,
            **{name: self.outcomes[name] for name in OUTCOMES},
            "errors": dict(self.errors),
            "events": dict(self.events),
            "endings": dict(self.endings),
            **{name: self._router.total(name) for name in _ROUTER_COUNTERS},
            **{name: self._nodes.total(name) for name in _NODE_COUNTERS},
            "gap_p50_s": round(stalls_s[len(stalls_s) // 2], 4) if stalls_s else None,
            "gap_p99_s": round(stalls_s[len(stalls_s) * 99 // 100], 3) if stalls_s else None,
            "longest_stall_s": round(stalls_s[-1], 2) if stalls_s else None,
            "longest_request_s": round(self.longest_request_s, 2),
            "lives": [life.as_dict(title) for title, life in self.lives.items() if life.seconds >= MIN_LIFE_S],
        }

    @property
    def is_good(self) -> bool:
        """Whether every request ended in a way that is allowed, and nothing else failed."""
        answered = sum(self.outcomes[name] for name in OUTCOMES)
        return self.failure is None and answered == self.requests and not any(self.outcomes[name] for name in _NEVER)
