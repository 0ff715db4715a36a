"""Two plans in flight on a device: it has the next step to compute before the tokens of the last one are known.

The device of these tests computes as late as it may (see ``late_device``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, outcomes_in_order, output, planes_of, run_batch, sequence
from late_device import LateFramework, LateOperations, LateStream, computes_late
from support.token_rules import few_tokens, strict_rules

from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder import load_weights
from kvrelay.engine.decoder_config import read_decoder_config
from kvrelay.engine.device.engine import DeviceEngine, DeviceStep
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, make_operations, make_projections
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.errors import EngineError
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome, StepResult
from kvrelay.protocol.request import Grammar, GrammarKind, Sequence
from kvrelay.protocol.token_rules import BadWords, TokenRules, token_mask

Make = Callable[..., tuple[DeviceEngine, LateStream]]


@pytest.fixture
def make(tiny_dir: Path) -> Iterator[Make]:
    """Make engines of the tiny checkpoint on late devices."""
    made: list[DeviceEngine] = []

    def make_one(**limits: Any) -> tuple[DeviceEngine, LateStream]:
        config = read_decoder_config(tiny_dir)
        checkpoint = Checkpoint.open(tiny_dir, config, lambda done, total: None)
        framework = LateFramework()
        weights = load_weights(checkpoint, DevicePacking(framework, "float32"))
        geometry = KVGeometry(4, config.num_kv_heads, config.head_dim, 16, "float32", checkpoint.digest())
        sizes = DeviceEngineLimits(
            **{"num_blocks": 64, "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, **limits}
        )
        options = DeviceOptions("cpu", "float32", 16)
        late = LateOperations(make_operations(config, framework, sizes, options), framework)
        projections = make_projections(config, framework, late, options)
        engine = DeviceEngine(config, weights, geometry, framework, late, projections, sizes)
        engine.warm_up()
        made.append(engine)
        return engine, computes_late(engine, framework)

    yield make_one
    for engine in made:
        engine.close()


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9},
    {"num_logprobs": 3},
    {"temperature": 0.8, "logit_bias": {5: 3.0}, "min_tokens": 4, "eos_token_ids": [7]},
]
NEEDS_TOKENS: dict[str, Any] = {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
ALLOWED: dict[str, Any] = {"token_rules": TokenRules(token_mask(few_tokens(384), 384), BadWords.of([[12]]))}
BAD_WORDS: dict[str, Any] = {"temperature": 0.7, "token_rules": strict_rules(384)}
GRAMMAR: dict[str, Any] = {"temperature": 0.7, "grammar": Grammar(GrammarKind.REGEX, "([a-m][n-z]){50}")}


def sequences(kinds: list[dict[str, Any]], count: int = 8) -> list[Sequence]:
    rng = np.random.default_rng(count)
    return [
        sequence(
            rng.integers(0, 384, 3 + 9 * index).tolist(), f"r{index}", max_tokens=7, seed=index,
            **kinds[index % len(kinds)],
        )
        for index in range(count)
    ]  # fmt: skip


class Ahead:
    """Plans as a node does that has two plans in flight: with tokens that are not known yet.

    ``quick``: the device has computed all it was told before the host asks for a step, though not copied it.
    """

    def __init__(self, engine: DeviceEngine, num_in_flight: int = 2, chunk: int = 1 << 20, quick: bool = False) -> None:
        self.engine = engine
        self._quick = quick
        self._num_in_flight = num_in_flight
        self._chunk = chunk
        self._writer = PlanWriter()
        self._free = np.random.default_rng(1).permutation(engine.memory.num_blocks).tolist()
        self._planned: dict[Sequence, int] = {}
        self._dropped: set[Sequence] = set()
        self.in_flight: deque[tuple[DeviceStep, list[tuple[Sequence, Chunk]]]] = deque()
        self.results: dict[Sequence, list[SampledTokens]] = {}
        self._num_steps = 0

    def next_chunk(self, one: Sequence) -> Chunk | None:
        """Return what can be computed next of ``one``, tokens that are being sampled included."""
        start = self._planned.get(one, 0)
        sampling = any(one is other and chunk.samples for _, batch in self.in_flight for other, chunk in batch)
        known = one.num_tokens + sampling
        if known - one.num_prompt_tokens >= one.sampling.max_tokens or one in self._dropped:
            return None
        count = min(self._chunk, known - start)
        end = start + count
        return Chunk(start, count, samples=end == known, awaits=end > one.num_tokens)

    def submit(self, *sequences: Sequence) -> bool:
        """Plan and launch a step of ``sequences``, those that have anything to compute; return whether any had."""
        batch = [(one, chunk) for one in sequences if (chunk := self.next_chunk(one)) is not None]
        if not batch:
            return False
        for one, chunk in batch:
            self._planned[one] = chunk.end
            while len(one.block_table) * 16 < chunk.end:
                one.block_table.append(self._free.pop())
        self._num_steps += 1
        plan = self._writer.write(self._num_steps, *zip(*batch, strict=True))
        step = self.engine.begin(plan)
        step.launch()
        self.in_flight.append((step, batch))
        return True

    def finish_one(self) -> StepResult:
        """Finish the oldest step and take its tokens in; sequences that were dropped leave when nothing has them."""
        if self._quick:
            self.engine.launcher.stream.synchronize()
        step, batch = self.in_flight.popleft()
        layers: list[int] = []

        def on_layers(computed: range) -> None:
            layers.extend(computed)
            assert all(self._is_there(layer, one, chunk) for layer in computed for one, chunk in batch)

        result = step.finish(on_layers)
        assert layers == [0, 1, 2, 3]
        for (one, chunk), outcome in zip(batch, result.outcomes.values(), strict=True):
            self._take(one, chunk, outcome)
        for one in self._dropped - {one for _, batch in self.in_flight for one, _ in batch}:
            self._leave(one)
        return result

    def _is_there(self, layer: int, one: Sequence, chunk: Chunk) -> bool:
        """Whether keys and values of ``chunk`` are in the memory that others read."""
        tokens = planes_of(self.engine)[layer].reshape(2, self.engine.memory.num_blocks * 16, -1)
        slots = [one.block_table[position // 16] * 16 + position % 16 for position in range(chunk.start, chunk.end)]
        return bool(tokens[:, slots].any(-1).all())

    def _take(self, one: Sequence, chunk: Chunk, outcome: SequenceOutcome) -> None:
        if one in self._dropped:
            return
        if isinstance(outcome, SequenceFailed):
            self.drop(one)
            return
        one.token_ids += outcome.token_ids
        one.num_computed_tokens = chunk.end
        if outcome.token_ids:
            self.results.setdefault(one, []).append(outcome)

    def drop(self, one: Sequence) -> None:
        """End ``one``, or take its blocks: plans that have it go on."""
        self._dropped.add(one)

    def _leave(self, one: Sequence) -> None:
        self._writer.leave(one)
        self._free += one.block_table
        one.take_blocks(())
        one.num_computed_tokens = 0
        self._planned.pop(one, None)
        self._dropped.discard(one)

    def run(self, *sequences: Sequence, at: Callable[[int], None] = lambda step: None) -> None:
        """Compute ``sequences`` to their end; ``at(number)`` is called after each step is launched."""
        while self.submit(*sequences) or self.in_flight:
            at(self._num_steps)
            if len(self.in_flight) == self._num_in_flight or not any(self.next_chunk(one) for one in sequences):
                self.finish_one()
        assert not self._dropped


def expected(kinds: list[dict[str, Any]], make: Make) -> list[list[int]]:
    engine, _ = make()
    alone = sequences(kinds)
    for one in alone:
        Runner(engine).finish(one)
    return [output(one) for one in alone]


@pytest.mark.parametrize(
    "kinds",
    [[*KINDS, ALLOWED], [*KINDS, NEEDS_TOKENS], [*KINDS, GRAMMAR], [*KINDS, BAD_WORDS]],
    ids=["any", "penalties", "grammars", "bad words"],
)
@pytest.mark.parametrize("chunk", [11, 1 << 20])
def test_tokens_are_those_of_one_plan_at_a_time(make: Make, kinds: list[dict[str, Any]], chunk: int) -> None:
    tokens = expected(kinds, make)
    variants: list[dict[str, Any]] = [
        {},
        {"device_pool": True, "digests": True, "decode_graphs": (2, 8), "chunk_graphs": (16, 128)},
    ]
    for limits in variants:
        for num_in_flight, quick in ((1, False), (2, False), (2, True)):
            engine, _ = make(**limits)
            started = sequences(kinds)
            Ahead(engine, num_in_flight, chunk, quick).run(*started)
            assert [output(one) for one in started] == tokens


def test_log_probabilities_are_those_of_the_token(make: Make) -> None:
    alone, ahead = (sequences([{"num_logprobs": 3}], 3) for _ in range(2))
    runner = Ahead(make(decode_graphs=(4,))[0])
    runner.run(*ahead)
    for one, there in zip(alone, ahead, strict=True):
        (theirs,) = Runner(make()[0]).finish(one)
        ours = runner.results[there]
        assert [entry.logprobs[0].top_token_ids for entry in ours] == [
            entry.logprobs[0].top_token_ids for entry in theirs
        ]
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.logprobs[0].top_logprobs, other.logprobs[0].top_logprobs, atol=1e-4)


def test_the_next_step_is_launched_before_the_device_has_computed_one(make: Make) -> None:
    engine, device = make(decode_graphs=(2,))
    ahead, (one, other) = Ahead(engine), sequences([{}, {"temperature": 1.0}], 2)
    ahead.submit(one, other)
    ahead.finish_one()
    for _ in range(5):
        while len(ahead.in_flight) < 2:
            done = device.num_done
            ahead.submit(one, other)
            assert device.num_done == done, "launching has waited for the device"
        ahead.finish_one()
        assert device.num_done < device.num_told, "finishing has waited for the step after"


@pytest.mark.parametrize("kind", [NEEDS_TOKENS, GRAMMAR, BAD_WORDS], ids=["penalties", "grammar", "bad words"])
def test_a_step_waits_for_tokens_that_its_penalties_or_rules_need(make: Make, kind: dict[str, Any]) -> None:
    engine, device = make()
    ahead, (one,) = Ahead(engine), sequences([kind], 1)
    ahead.submit(one)
    told = device.num_told
    ahead.submit(one)
    assert device.num_told == told
    ahead.finish_one()
    ahead.finish_one()
    assert one.num_output_tokens == 2
    alone = sequences([kind], 1)[0]
    Runner(make()[0]).finish(alone)
    assert output(one) == output(alone)[:2]


@pytest.mark.parametrize("max_num_seqs", [2, 3, 8])
def test_drafts_without_room_for_their_masks_are_left_out(make: Make, max_num_seqs: int) -> None:
    alone, drafted = sequences([GRAMMAR], 2), sequences([GRAMMAR], 2)
    Runner(make()[0]).finish(*alone)
    runner = Runner(make(max_num_seqs=max_num_seqs)[0])
    runner.run(*((one, one.num_tokens) for one in drafted))
    batch = []
    for one, right in zip(drafted, alone, strict=True):
        start, drafts = one.num_tokens - 1, tuple(output(right)[1:3])
        runner.give_blocks(one, start + 3)
        batch.append((one, Chunk(start, 3, True, drafts)))
    sampled = run_batch(runner.engine, *batch).sampled
    assert [one.token_ids for one in sampled] == [
        output(one)[1 : 1 + len(step.token_ids)] for one, step in zip(alone, sampled, strict=True)
    ]
    assert [len(one.token_ids) for one in sampled] == {2: [1, 1], 3: [1, 1], 8: [3, 3]}[max_num_seqs]


def test_a_grammar_that_fails_fails_alone(make: Make) -> None:
    fine, broken = sequences([GRAMMAR, {"grammar": Grammar(GrammarKind.REGEX, "(")}], 2)
    runner = Runner(make()[0])
    for one in (fine, broken):
        runner.give_blocks(one, one.num_tokens)
    batch = ((one, Chunk(0, one.num_tokens, True)) for one in (fine, broken))
    first, second = outcomes_in_order(run_batch(runner.engine, *batch))
    assert isinstance(first, SampledTokens)
    assert isinstance(second, SequenceFailed)
    assert second.reason.startswith("output position 0 cannot be sampled: the grammar cannot go on: ")


def test_a_step_after_one_that_waits_waits_too(make: Make) -> None:
    """Else the second chunk of a prompt would be computed before the first."""
    penalized, long = sequences([NEEDS_TOKENS, {}], 2)
    long.token_ids += [7] * 50
    long.num_prompt_tokens = long.num_tokens
    ahead = Ahead(make()[0], chunk=40)
    ahead.submit(penalized)
    ahead.submit(penalized, long)
    ahead.finish_one()
    ahead.submit(long)
    while ahead.in_flight:
        ahead.finish_one()
    alone = sequence(list(long.token_ids[:-1]), max_tokens=1)
    Runner(make()[0]).finish(alone)
    assert output(long) == output(alone)


def test_sequences_leave_and_come_back_while_steps_are_in_flight(make: Make) -> None:
    """Aborted, preempted and recomputed, with rows and blocks that pass from one to another."""
    tokens = expected(KINDS, make)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        engine, _ = make(
            max_num_seqs=3, num_blocks=24, device_pool=seed % 2 > 0, decode_graphs=(3,) if seed > 1 else ()
        )
        ahead, started = Ahead(engine), sequences(KINDS)
        while running := [one for one in started if one.num_output_tokens < 7]:
            few = running[:3]

            def disturb(step: int, few: list[Sequence] = few, rng: Any = rng, ahead: Ahead = ahead) -> None:
                if rng.integers(0, 3) == 0:
                    ahead.drop(few[rng.integers(0, len(few))])

            ahead.submit(*few)
            disturb(0)
            ahead.submit(*few)
            disturb(0)
            while ahead.in_flight:
                ahead.finish_one()
            for one in few:
                if one.num_output_tokens >= 7:
                    ahead.drop(one)
                    ahead._leave(one)
        assert [output(one) for one in started] == tokens


def test_a_sequence_whose_token_was_not_sampled_fails_in_the_step_that_awaits_it(make: Make) -> None:
    """The others of both steps are as if it had not been there."""
    engine, _ = make()
    good, bad = sequences([{}], 2)
    bad.sampling.logit_bias.update({token: -float("inf") for token in range(384)})
    ahead = Ahead(engine)
    ahead.submit(good, bad)
    ahead.submit(good, bad)
    first, second = ahead.finish_one(), ahead.finish_one()
    assert "leave no token" in list(first.outcomes.values())[1].reason  # type: ignore[union-attr]
    assert "no token was sampled for position 12" in list(second.outcomes.values())[1].reason  # type: ignore[union-attr]
    ahead.run(good)
    alone = sequences([{}], 2)[0]
    Runner(make()[0]).finish(alone)
    assert output(good) == output(alone)


def test_a_step_that_raises_leaves_the_queue_of_deferred_steps(make: Make) -> None:
    """Else all later steps would be deferred too, and launched when the device is idle."""
    engine, device = make()
    ahead, (one,) = Ahead(engine), sequences([{}], 1)
    step = engine.begin(PlanWriter().write(0, [], []))
    step.launch()
    with pytest.raises(EngineError, match="without sequences"):
        step.finish(lambda layers: None)
    told = device.num_told
    ahead.submit(one)
    assert device.num_told > told, "the next step is launched at once"
    ahead.run(one)


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_cannot_be_launched_is_computed_when_those_before_it_are_over(
    make: Make, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The step after it, which awaits its tokens, waits too; a second error has it computed in halves."""
    engine, _ = make(device_pool=True, digests=True)
    started = sequences(KINDS, 4)
    ahead = Ahead(engine)
    assemble, calls = engine.launcher.assembler.assemble, iter([True] * 3 + [False] * times + [True] * 99)

    def breaks(items: Any) -> Any:
        batch = assemble(items)
        if not next(calls):
            raise RuntimeError("out of memory")
        return batch

    monkeypatch.setattr(engine.launcher.assembler, "assemble", breaks)
    ahead.run(*started)
    monkeypatch.undo()
    alone = sequences(KINDS, 4)
    for one in alone:
        Runner(engine).finish(one)
    assert [output(one) for one in started] == [output(one) for one in alone]
