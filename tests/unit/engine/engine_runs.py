"""Driving an engine the way a node does, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvrelay.core.config import ClusterConfig, NodeConfig
from kvrelay.core.kv_memory import KVMemory
from kvrelay.core.request import RequestSpec, SamplingParams, Sequence
from kvrelay.core.step import SampledTokens, ScheduledSequence, StepPlan
from kvrelay.engine.interface import Engine
from kvrelay.engine.kernels import KernelsUnavailableError
from kvrelay.engine.load import load_engine

KERNELS = ("portable", "native", "products")
"""Each kind of kernels that computes on a CPU; products: what there is without our own library."""


def use_kernels(name: str, patch: pytest.MonkeyPatch) -> str:
    """Return what ``engine.kernels`` must be to get kernels ``name``; skip the test if they cannot be had here."""
    from kvrelay.engine import choice

    try:
        if name != "portable":
            choice.open_onednn()
        if name == "native":
            choice.open_library()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    if name == "products":
        patch.setattr(choice, "open_library", not_compiled)
        return "auto"
    return name


def not_compiled() -> Any:
    raise KernelsUnavailableError("the native kernels were not compiled when kvrelay was installed")


def node_config(model_dir: Path, **sections: Any) -> NodeConfig:
    """Return the config of a mixed node that serves ``model_dir``."""
    nodes = [{"name": "m0", "role": "mixed", "port": 8200}]
    data = {"model": {}, "cache": {"num_blocks": 256}, "nodes": nodes, **sections}
    data["model"] = {"path": str(model_dir), **data["model"]}
    return ClusterConfig.from_data(data).node("m0")


def open_engine(model_dir: Path, **sections: Any) -> Engine:
    """Return a loaded engine."""
    return load_engine(node_config(model_dir, **sections), lambda done, total: None)


def sequence(tokens: list[int], name: str = "r", **sampling: Any) -> Sequence:
    """Return a greedy sequence unless ``sampling`` says otherwise."""
    params = SamplingParams(**{"max_tokens": 64, "seed": 0, "temperature": 0.0, "ignore_eos": True, **sampling})
    return Sequence(RequestSpec(request_id=name, epoch=0, prompt_token_ids=tokens, sampling=params))


def planes_of(engine: Engine) -> npt.NDArray[np.uint8]:
    """Return the bytes of an engine's pool, which is in this process."""
    assert isinstance(engine.memory, KVMemory)
    return engine.memory.planes


class Runner:
    """Schedules sequences on an engine by hand; hands out blocks in a random order."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.step = 0
        self.free = np.random.default_rng(seed).permutation(engine.memory.num_blocks).tolist()

    def give_blocks(self, one: Sequence, num_tokens: int) -> None:
        while len(one.block_table) * self.engine.geometry.block_size < num_tokens:
            one.block_table.append(self.free.pop())

    def run(self, *batch: tuple[Sequence, int], layers: list[int] | None = None) -> list[SampledTokens]:
        """Run one step that computes the next so many tokens of each sequence; sampled ones are appended."""
        scheduled = []
        for one, count in batch:
            self.give_blocks(one, one.num_computed_tokens + count)
            samples = one.num_computed_tokens + count == one.num_tokens
            scheduled.append(ScheduledSequence(one, one.num_computed_tokens, count, samples))
        self.step += 1
        heard: list[int] = [] if layers is None else layers
        result = self.engine.run(StepPlan(self.step, scheduled), heard.append)
        for item, sampled in zip(scheduled, result.sampled, strict=True):
            item.sequence.num_computed_tokens += item.num_tokens
            item.sequence.token_ids += sampled.token_ids
        return result.sampled

    def finish(self, *sequences: Sequence, chunk: int = 1 << 30) -> list[list[SampledTokens]]:
        """Run ``sequences`` together to their ``max_tokens``, prompts in chunks; return what each sampled."""
        outputs: list[list[SampledTokens]] = [[] for _ in sequences]
        while running := [one for one in sequences if one.num_output_tokens < one.sampling.max_tokens]:
            step = [(one, min(chunk, one.num_tokens - one.num_computed_tokens)) for one in running]
            for one, sampled in zip(running, self.run(*step), strict=True):
                if sampled.token_ids:
                    outputs[sequences.index(one)].append(sampled)
        return outputs


def output(one: Sequence) -> list[int]:
    return one.token_ids[one.num_prompt_tokens :]
