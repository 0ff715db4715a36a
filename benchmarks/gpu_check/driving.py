"""Driving an engine as a scheduler would: sequences with blocks, steps, and engines of random weights."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np

from gpu_check.context import Context
from kvrelay.engine.device.engine import DeviceEngine, DeviceStep
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, random_engine
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.messages.engine import StepPlan
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence


class Mode(NamedTuple):
    """As in DeviceOptions."""

    fp8: bool = False
    deterministic: bool = False

    @property
    def suffix(self) -> str:
        """What it adds to the name of a measurement."""
        return ", fp8" * self.fp8 + ", deterministic" * self.deterministic


PLAIN = Mode()


def sequence(tokens: Seq[int], name: str, **sampling: Any) -> Sequence:
    """Return a sequence, greedy unless ``sampling`` says otherwise."""
    params = SamplingParams(**{"max_tokens": 1 << 20, "seed": 7, "temperature": 0.0, **sampling})
    return Sequence(RequestSpec(request_id=RequestId(name), epoch=0, prompt_token_ids=list(tokens), sampling=params))


class Driver:
    """Schedules sequences on an engine by hand; hands out blocks in a random order."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._engine = engine
        self._step = 0
        self._plans = PlanWriter()
        self._planned: list[tuple[Sequence, Chunk]] = []
        self._free = np.random.default_rng(0).permutation(engine.memory.num_blocks).tolist()

    def plan(self, batch: list[tuple[Sequence, int]]) -> StepPlan:
        """Return a step that computes the next so many tokens of each sequence, with the blocks it needs."""
        self._planned = []
        for one, count in batch:
            end = one.num_computed_tokens + count
            while len(one.block_table) * self._engine.geometry.block_size < end:
                one.block_table.append(self._free.pop())
            self._planned.append((one, Chunk(one.num_computed_tokens, count, end == one.num_tokens)))
        self._step += 1
        return self._plans.write(self._step, [one for one, _ in batch], [chunk for _, chunk in self._planned])

    def run(self, batch: list[tuple[Sequence, int]]) -> None:
        """Run such a step and append what it samples."""
        self.finish(self._engine.run(self.plan(batch), lambda layers: None).sampled)

    def finish(self, sampled: list[Any]) -> None:
        """Take in the results of the last plan."""
        for (one, chunk), result in zip(self._planned, sampled, strict=True):
            one.num_computed_tokens += chunk.num_tokens
            one.token_ids += result.token_ids

    def complete(self, sequences: list[Sequence], num_tokens: int, chunk: int) -> list[list[int]]:
        """Run ``sequences`` together, prompts in chunks, until each has so many output tokens; return those."""
        while running := [one for one in sequences if one.num_output_tokens < num_tokens]:
            self.run([(one, min(chunk, one.num_tokens - one.num_computed_tokens)) for one in running])
        return [one.token_ids[one.num_prompt_tokens :] for one in sequences]

    def complete_ahead(self, sequences: list[Sequence], num_tokens: int, chunk: int) -> list[list[int]]:
        """See ``complete``, with two steps in flight: most tokens are not known when the next step is launched."""
        ahead = AheadDriver(self, chunk)
        while ahead.submit([one for one in sequences if ahead.num_outputs(one) < num_tokens]) or ahead.in_flight:
            if len(ahead.in_flight) == 2 or all(ahead.num_outputs(one) >= num_tokens for one in sequences):
                ahead.finish_one()
        return [one.token_ids[one.num_prompt_tokens :] for one in sequences]

    def begin(self, batch: list[tuple[Sequence, Chunk]]) -> DeviceStep:
        """Return the step that computes a chunk of each sequence, with the blocks it needs."""
        for one, chunk in batch:
            while len(one.block_table) * self._engine.geometry.block_size < chunk.end:
                one.block_table.append(self._free.pop())
        self._step += 1
        plan = self._plans.write(self._step, [one for one, _ in batch], [chunk for _, chunk in batch])
        return self._engine.begin(plan)

    def give_back(self, sequences: list[Sequence]) -> None:
        """Take the blocks of ``sequences`` back."""
        for one in sequences:
            self._plans.leave(one)
            self._free += one.block_table
            one.take_blocks(())


class AheadDriver:
    """Plans steps before the tokens of the last one are known, as a node does."""

    def __init__(self, driver: Driver, chunk: int = 1 << 20) -> None:
        self._driver = driver
        self._chunk = chunk
        self._planned: dict[Sequence, int] = {}
        self._sampling: Counter[Sequence] = Counter()
        self.in_flight: deque[tuple[DeviceStep, list[tuple[Sequence, Chunk]]]] = deque()
        self.launch_seconds: list[float] = []

    def num_outputs(self, one: Sequence) -> int:
        """Return how many output tokens ``one`` has, those that are being sampled included."""
        return one.num_output_tokens + self._sampling[one]

    def submit(self, sequences: list[Sequence]) -> bool:
        """Launch a step of ``sequences``; return whether there are any."""
        batch = []
        for one in sequences:
            start, known = self._planned.get(one, one.num_computed_tokens), one.num_tokens + self._sampling[one]
            end = min(start + self._chunk, known)
            batch.append((one, Chunk(start, end - start, end == known, awaits=end > one.num_tokens)))
        if not batch:
            return False
        step = self._driver.begin(batch)
        for one, chunk in batch:
            self._planned[one] = chunk.end
            self._sampling[one] += chunk.samples
        began = time.perf_counter()
        step.launch()
        self.launch_seconds.append(time.perf_counter() - began)
        self.in_flight.append((step, batch))
        return True

    def finish_one(self) -> None:
        """Wait for the oldest step; take its tokens in."""
        step, batch = self.in_flight.popleft()
        result = step.finish(lambda layers: None)
        for (one, chunk), sampled in zip(batch, result.sampled, strict=True):
            one.num_computed_tokens = chunk.end
            one.token_ids += sampled.token_ids
            self._sampling[one] -= chunk.samples


def engine_of(
    context: Context, name: str, *, num_blocks: int, max_num_seqs: int, tokens: int, max_model_len: int,
    decode_graphs: tuple[int, ...], chunk_graphs: tuple[int, ...] = (), dtype: str = "bfloat16", digests: bool = False,
    mode: Mode = PLAIN,
) -> DeviceEngine:  # fmt: skip
    """Return an engine of the shape ``name`` with random weights and a pool that others can open."""
    limits = DeviceEngineLimits(
        num_blocks, max_model_len, max_num_seqs, tokens, decode_graphs, chunk_graphs, device_pool=True, digests=digests
    )
    interpreted = context.interpreted and mode.deterministic  # the others have references
    how = DeviceOptions(context.device, dtype, 16, interpreted, *mode)
    return random_engine(context.config(name), limits, how)
