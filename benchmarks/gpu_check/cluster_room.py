"""What the measurements of clusters share: how large they are, how clusters are started, and what failed."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from gpu_check.context import Context
from gpu_check.decode import kv_bytes, weight_bytes
from gpu_check.jobs import Answer, Ask
from gpu_check.processes import Clients, Cluster, Config
from kvrelay.engine.presets import SHAPES, write_shape
from kvrelay.engine.tiny import write_tiny_checkpoint

T = TypeVar("T")

BLOCK = 16
"""Tokens of a KV block."""

RESERVE_BYTES = 12 << 30
"""Of the device's memory: for graphs, steps and CUDA contexts beside weights and pool, those of other clusters too."""

MANY_CPUS = 12
"""With fewer, clusters are started one after the other."""

START_S = 75.0
"""Patience for a cluster: compiling and capturing graphs included."""


class Sizes(NamedTuple):
    """Tokens of prompts, outputs and steps, and how many requests there are at once."""

    prompt: int = 1024
    output: int = 256
    batches: tuple[int, ...] = (1, 32, 256)
    burst: int = 16
    burst_output: int = 128
    step_tokens: int = 8192


TINY = Sizes(prompt=40, output=24, batches=(1, 4, 8), burst=4, burst_output=12, step_tokens=256)


class Room:
    """Where clusters run: a folder, processes that are their clients, and what went wrong so far.

    Whatever is started is ended with ``stack``.
    """

    def __init__(self, context: Context, stack: contextlib.ExitStack) -> None:
        self.context = context
        self.sizes = TINY if context.tiny else Sizes()
        self.start_s = START_S * context.patience
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gc-")))
        self.failures: list[str] = []
        self.starts_at_once = (os.cpu_count() or 1) >= MANY_CPUS
        self._stack = stack
        self._clients = Clients(4 if self.starts_at_once else 2)
        stack.callback(self._clients.close)
        self._num_loads = 0
        self.largest_batch: dict[str, int] = {}
        """Of those in ``sizes``, by model: for how many requests its mixed node has KV blocks."""

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Return what ``work`` returns; print and note an error, so that other work goes on."""
        try:
            return work()
        except Exception as error:
            print(f"## cluster: {traceback.format_exc()[-4000:]}", flush=True)
            self.failures.append(f"{type(error).__name__}: {str(error)[:200]}")
            return None

    def add(self, what: str, value: Any, unit: str = "", limit: float | None = None, note: str = "") -> None:
        """Add a row."""
        self.context.report.add("cluster", what, value, unit, limit, note)

    # ------------------------------------------------------------ clusters

    def start(self, name: str, nodes: dict[str, Config], sections: Config) -> Cluster:
        """Start a cluster, which is not up yet."""
        settings = {"peer_timeout_s": 30.0, "max_crashes": 1, "drain_timeout_s": 5.0}
        cluster = Cluster(self.folder, name, nodes, {"cluster": settings, **sections})
        self._stack.callback(self._end, cluster)
        return cluster

    def _end(self, cluster: Cluster) -> None:
        cluster.kill()
        self.context.report.keep("cluster.log", f"# {cluster.name}\n{cluster.log}")

    def up(self, cluster: Cluster) -> None:
        """Wait until ``cluster`` serves; report how long that took."""
        note = (
            "beside the clusters of the golden tokens, and seen after these"
            if self.starts_at_once and not self._num_loads
            else ""
        )
        self.add(f"{cluster.name}, from start to ready", cluster.wait_until_up(self.start_s), "s", None, note)

    def engine(self, device: str = "") -> Config:
        """Return the section for an engine on ``device``, by default on the one that is checked."""
        return {"kind": "torch", "device": device or self.context.device}

    def model(self, name: str) -> Config:
        """Return the section for a model of the shape ``name`` with random weights."""
        path = self.folder / name
        if not path.exists():
            if self.context.tiny:
                write_tiny_checkpoint(path, SHAPES[name]["model_type"])
            else:
                write_shape(path, name)
        longest = 2 * (self.sizes.prompt + self.sizes.output)
        return {"path": str(path), "served_name": name, "load_format": "dummy", "max_model_len": longest}

    def start_mixed(self, name: str) -> Cluster:
        """Start a mixed node with a model of the shape ``name`` and room for the largest batch."""
        fit = {batch: self._blocks(batch) for batch in self.sizes.batches}
        most = max((batch for batch in fit if fit[batch] <= self._blocks_that_fit(name)), default=0)
        if most < self.sizes.burst:
            raise RuntimeError(f"{name}: the device has no room for {self.sizes.burst} requests now")
        self.largest_batch[name] = most
        sections = {
            "model": self.model(name),
            "engine": self.engine(),
            "cache": {"block_size": BLOCK, "num_blocks": fit[most]},
            "scheduler": {"max_num_seqs": most, "max_num_batched_tokens": self.sizes.step_tokens},
        }
        return self.start(f"{name} mixed", {"m0": {"role": "mixed"}}, sections)

    def _blocks(self, batch: int) -> int:
        """Return the blocks of so many requests, with what the scheduler keeps free."""
        return int(1.03 * batch * math.ceil((self.sizes.prompt + self.sizes.output) / BLOCK)) + 64

    def _blocks_that_fit(self, name: str) -> float:
        if self.context.device == "cpu":
            return math.inf
        config = self.context.config(name)
        weights = weight_bytes(config) + 2 * config.vocab_size * config.hidden_size
        free, _ = torch.cuda.mem_get_info()
        return float(free - weights - RESERVE_BYTES) / (BLOCK * kv_bytes(config))

    # ------------------------------------------------------------ requests

    def ask(self, cluster: Cluster, asks: Sequence[Ask]) -> list[Answer]:
        """Return the answers of ``cluster``, in the order of ``asks``. Raises RuntimeError if one fails."""
        return self._clients.ask(cluster.port, asks)

    def asks(self, name: str, count: int, output: int, gap_s: float = 0.0) -> list[Ask]:
        """Return ``count`` requests with prompts that no other has, one every ``gap_s`` seconds."""
        vocab_size = 384 if self.context.tiny else self.context.config(name).vocab_size
        rng = np.random.default_rng(self._num_loads)
        self._num_loads += 1
        prompts = rng.integers(3, vocab_size, (count, self.sizes.prompt)).tolist()
        return [Ask(prompt, output, index * gap_s) for index, prompt in enumerate(prompts)]
