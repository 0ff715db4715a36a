"""Driving an engine the way a node does, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import pytest

from kvrelay.config.cluster_config import ClusterConfig, NodeConfig
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.sequences import EngineSequence
from kvrelay.errors import KernelsUnavailableError
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.ids import BlockId, RequestId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence, SampledTokens, SequenceOutcome, StepPlan, StepResult
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence

KERNELS = ("portable", "native", "gemm")
"""Each kind of kernels that computes on a CPU; gemm: those without our own library."""


def use_kernels(name: str, patch: pytest.MonkeyPatch) -> str:
    """Return what ``engine.kernels`` must be to get kernels ``name``; skip the test if they cannot be had here."""
    from kvrelay.engine import select_kernels

    try:
        if name != "portable":
            select_kernels.open_onednn()
        if name == "native":
            select_kernels.open_library()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    if name == "gemm":
        patch.setattr(select_kernels, "open_library", not_compiled)
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
    return Sequence(RequestSpec(request_id=RequestId(name), epoch=0, prompt_token_ids=tokens, sampling=params))


def planes_of(engine: Engine) -> npt.NDArray[np.uint8]:
    """Return the bytes of an engine's pool, which is in this process."""
    memory, geometry = engine.memory, engine.geometry
    if isinstance(memory, DeviceMemory):
        words: npt.NDArray[np.int64] = memory.blocks.words
        return words.view(np.uint8).reshape(geometry.num_layers, 2, memory.num_blocks, -1)
    assert isinstance(memory, KVMemory)
    return memory.planes


Logits = npt.NDArray[np.float32]
_writers: WeakKeyDictionary[Engine, PlanWriter] = WeakKeyDictionary()


def writer_of(engine: Engine) -> PlanWriter:
    """Return what writes the plans of ``engine``, whoever drives it: one for each."""
    return _writers.setdefault(engine, PlanWriter())


def plan_of(engine: Engine, *batch: tuple[Sequence, Chunk], step: int = 1) -> StepPlan:
    """Return the plan for ``engine`` that computes a chunk of each sequence."""
    return writer_of(engine).write(step, [one for one, _ in batch], [chunk for _, chunk in batch])


def run_batch(engine: Engine, *batch: tuple[Sequence, Chunk], layers: list[int] | None = None) -> StepResult:
    """Compute a chunk of each sequence; the sequences stay as they are."""
    heard: list[int] = [] if layers is None else layers

    def on_layers(layers: range) -> None:
        for layer in layers:
            heard.append(layer)

    return engine.run(plan_of(engine, *batch), on_layers)


def outcomes_in_order(result: StepResult) -> list[SequenceOutcome]:
    """Return what came of each sequence, in the order of the batch."""
    return list(result.outcomes.values())


def take(engine: Engine, one: Sequence, chunk: Chunk, sampled: SampledTokens) -> None:
    """Let ``one`` be as the engine has it: as a machine does when the result comes in."""
    if chunk.drafts is not None:
        writer_of(engine).accepted(one, len(sampled.token_ids) - 1)
    one.token_ids += sampled.token_ids
    one.num_computed_tokens = chunk.end if chunk.drafts is None else one.num_tokens - 1


def spy_on_sampling(patch: pytest.MonkeyPatch, see: Callable[[Logits | None, Any], object]) -> None:
    """Have ``see`` called with the logits and the items of each step before they are sampled."""
    from kvrelay.engine import native_kernels, portable, sampler

    def spy(logits: Logits | None, batch: Any) -> list[SequenceOutcome]:
        see(logits, batch)
        return sampler.sample_step(logits, batch)

    for module in (native_kernels, portable):
        patch.setattr(module, "sample_step", spy)


class Runner:
    """Schedules sequences on an engine by hand; hands out blocks in a random order."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
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
            scheduled.append((one, Chunk(one.num_computed_tokens, count, samples)))
        result = run_batch(self.engine, *scheduled, layers=layers)
        for (one, chunk), sampled in zip(scheduled, result.sampled, strict=True):
            take(self.engine, one, chunk, sampled)
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


def engine_sequence(tokens: list[int], blocks: list[BlockId]) -> EngineSequence:
    """Return a sequence as an engine knows it."""
    params = SamplingParams(max_tokens=64, seed=0, temperature=0.0)
    return EngineSequence(
        NewSequence(
            id=SequenceId(1),
            request_id=RequestId("r"),
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            sampling=params,
            block_table=blocks,
        )
    )


def output(one: Sequence) -> list[int]:
    return one.token_ids[one.num_prompt_tokens :]
