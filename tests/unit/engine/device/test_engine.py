"""The device engine on a CPU: steps with and without graphs, rows of sequences, and pools on a simulated device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, outcomes_in_order, output, plan_of, planes_of, run_batch, sequence, take
from support.ids import block_ids
from support.token_rules import strict_rules

from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.compute_thread import compute_for
from kvrelay.engine.decoder import load_weights
from kvrelay.engine.decoder_config import read_decoder_config
from kvrelay.engine.device import prompt_scores
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine
from kvrelay.engine.device.pool import announced_after
from kvrelay.engine.device.tiles import DenseRoom
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.torch_operations import TorchOperations
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.errors import DeviceError, EngineError
from kvrelay.kv_pool.block_digest import digest_blocks, fold
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.machine.contract import LayersComputed, StepDone
from kvrelay.node.plans import Chunk
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import BlockId
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed
from kvrelay.protocol.request import PromptLogprobs, Sequence

Make = Callable[..., DeviceEngine]


@pytest.fixture
def make(tiny_dir: Path) -> Iterator[Make]:
    """Make engines of the tiny checkpoint, closed at the end."""
    made: list[DeviceEngine] = []

    def make_one(framework: TorchFramework | None = None, **limits: Any) -> DeviceEngine:
        config = read_decoder_config(tiny_dir)
        checkpoint = Checkpoint.open(tiny_dir, config, lambda done, total: None)
        framework = framework or TorchFramework("cpu")
        weights = load_weights(checkpoint, DevicePacking(framework, "float32"))
        geometry = KVGeometry(4, config.num_kv_heads, config.head_dim, 16, "float32", checkpoint.digest())
        sizes = {"num_blocks": 64, "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, **limits}
        options = DeviceOptions("cpu", "float32", 16)
        made.append(build_engine(config, weights, geometry, framework, DeviceEngineLimits(**sizes), options))
        return made[-1]

    yield make_one
    for engine in made:
        engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng([length, seed]).integers(0, 384, length).tolist()
    return tokens


def sequences(count: int = 8) -> list[Sequence]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.3, "num_logprobs": 3},
        {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}, "min_tokens": 4, "eos_token_ids": [7]},
        {"temperature": 1.0, "token_rules": strict_rules(384)},
    ]
    return [
        sequence(prompt(3 + 9 * index), f"r{index}", max_tokens=7, seed=index, **kinds[index % len(kinds)])
        for index in range(count)
    ]


def run_all(engine: DeviceEngine, chunk: int = 1 << 20) -> list[list[SampledTokens]]:
    return Runner(engine).finish(*sequences(), chunk=chunk)


def test_graphs_chunks_and_pools_change_no_token(make: Make) -> None:
    expected = [Runner(make()).finish(one)[0] for one in sequences()]
    tokens = [[entry.token_ids for entry in one] for one in expected]
    variants: list[dict[str, Any]] = [
        {},
        {"decode_graphs": (2, 8), "chunk_graphs": (16, 128)},
        {"device_pool": True, "digests": True, "decode_graphs": (8,)},
    ]
    for limits in variants:
        for chunk in (11, 1 << 20):
            results = run_all(make(**limits), chunk)
            assert [[entry.token_ids for entry in one] for one in results] == tokens
            for ours, theirs in zip(results[2], expected[2], strict=True):
                assert ours.logprobs[0].top_token_ids == theirs.logprobs[0].top_token_ids
                np.testing.assert_allclose(ours.logprobs[0].logprob, theirs.logprobs[0].logprob, atol=1e-4)


def test_chunks_whose_contexts_are_gathered_give_the_same_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some chunks are too short, and some find no room."""
    expected = [[entry.token_ids for entry in one] for one in run_all(make())]
    monkeypatch.setattr(TorchOperations, "room", DenseRoom(capacity=96, fewest=8, piece=8))
    for chunk in (11, 1 << 20):
        results = run_all(make(chunk_graphs=(16,)), chunk)
        assert [[entry.token_ids for entry in one] for one in results] == expected


def test_rows_are_reused_when_more_sequences_come_than_there_are(make: Make) -> None:
    engine = make(max_num_seqs=2, decode_graphs=(2,))
    runner = Runner(engine)
    started = sequences(6)
    for one in started:
        runner.run((one, one.num_tokens))
    outputs = [[*output(one)] for one in started]
    for one, tokens in zip(started, outputs, strict=True):
        for entry in runner.finish(one)[0]:
            tokens.extend(entry.token_ids)
    assert outputs == [output(one) for one in started]
    for one, there in zip(sequences(6), started, strict=True):
        Runner(make()).finish(one)
        assert output(one) == output(there)


def test_drafts_are_accepted_as_far_as_they_are_right(make: Make) -> None:
    engine = make()
    for index in range(4):
        one = sequences()[index]
        Runner(engine).finish(one)
        tokens = output(one)
        again, runner = sequences()[index], Runner(engine, seed=1)
        runner.run((again, again.num_tokens))
        drafts = (*tokens[1:3], (tokens[3] + 1) % 384, 5)
        runner.give_blocks(again, again.num_tokens + len(drafts))
        chunk = Chunk(again.num_tokens - 1, 1 + len(drafts), True, drafts)
        (sampled,) = run_batch(engine, (again, chunk)).sampled
        assert sampled.token_ids == tokens[1:4]
        assert len(sampled.logprobs) == (3 if again.sampling.num_logprobs is not None else 0)


def test_a_cached_prompt_computes_its_last_token_and_writes_nothing(make: Make) -> None:
    engine = make(device_pool=True)
    one, runner = sequence(prompt(32), max_tokens=1), Runner(engine)
    runner.run((one, 32))
    before = planes_of(engine).copy()
    again = sequence(prompt(32), "again")
    again.take_blocks(one.block_table)
    again.num_computed_tokens = 32
    (sampled,) = run_batch(engine, (again, Chunk(31, 1, True))).sampled
    assert sampled.token_ids == output(one)
    assert np.array_equal(planes_of(engine), before)


def test_a_layer_is_in_the_memory_when_it_is_announced(make: Make) -> None:
    for limits in (
        {"device_pool": True, "digests": True},
        {"device_pool": True, "digests": True, "chunk_graphs": (32,)},
        {},
    ):
        engine = make(**limits)
        runner, one = Runner(engine), sequence(prompt(20), max_tokens=1)
        runner.give_blocks(one, 20)
        heard = Heard(engine, list(one.block_table))
        runner.run((one, 20), layers=heard)
        assert heard.seen == [(layer, True) for layer in range(4)]


class Heard(list[int]):
    """Notes at each announcement of a layer whether its KV is in the memory."""

    def __init__(self, engine: DeviceEngine, blocks: list[BlockId]) -> None:
        super().__init__()
        self._engine, self._blocks = engine, blocks
        self.seen: list[tuple[int, bool]] = []

    def append(self, layer: int) -> None:
        written = planes_of(self._engine)[layer][:, self._blocks].any(-1).all()
        self.seen.append((layer, bool(written)))


@pytest.mark.parametrize(
    ("num_layers", "ends"),
    [(1, [1]), (2, [1, 2]), (4, [2, 3, 4]), (6, [4, 5, 6]), (32, [*range(4, 29, 4), 30, 31, 32])],
)
def test_the_last_layers_are_announced_in_smaller_groups(num_layers: int, ends: list[int]) -> None:
    assert announced_after(num_layers) == ends


def test_layers_are_announced_while_later_layers_are_launched(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer is not launched before the first ones are announced, so none may wait for the whole launch."""
    engine = make(device_pool=True, digests=True)
    posted: SimpleQueue[object] = SimpleQueue()
    first_announced, launching, in_time = threading.Event(), threading.get_ident(), list[bool]()
    attention, begin_digest, calls = engine.launcher.decoder._operations.attention, DeviceMemory.begin_digest, count()

    def attention_of_last_layer_waits(*arguments: Any) -> Any:
        nonlocal launching
        launching = threading.get_ident()
        if next(calls) == 3:
            in_time.append(first_announced.wait(60))
        return attention(*arguments)

    def digest(*arguments: Any, **named: Any) -> Any:
        assert threading.get_ident() != launching, "a digest delays the launch of later layers"
        return begin_digest(*arguments, **named)

    def post(event: object) -> None:
        posted.put(event)
        first_announced.set()

    monkeypatch.setattr(engine.launcher.decoder._operations, "attention", attention_of_last_layer_waits)
    monkeypatch.setattr(DeviceMemory, "begin_digest", digest)
    one = sequence(prompt(20), max_tokens=1)
    Runner(engine).give_blocks(one, 20)
    compute = compute_for(engine, post, layer_events=True)
    compute.start()
    compute.submit(plan_of(engine, (one, Chunk(0, 20, True))))
    compute.stop()
    assert in_time == [True]
    events = [posted.get() for _ in range(posted.qsize())]
    assert events[:-1] == [LayersComputed(1, layers) for layers in (range(2), range(2, 3), range(3, 4))]
    assert isinstance(events[-1], StepDone)


def test_kv_that_others_wrote_is_read(make: Make) -> None:
    here, there = make(device_pool=True), make(device_pool=True)
    one, expected = sequence(prompt(33), max_tokens=6), sequence(prompt(33), max_tokens=6)
    Runner(make()).finish(expected)
    Runner(there).run((one, 33))
    away, runner = list(one.block_table), Runner(here, seed=3)
    one.take_blocks(())
    runner.give_blocks(one, 33)
    planes_of(here)[:, :, one.block_table] = planes_of(there)[:, :, away]
    runner.finish(one)
    assert output(one) == output(expected)


def test_a_sequence_that_grew_elsewhere_is_read_anew(make: Make) -> None:
    here, there = make(device_pool=True), make(device_pool=True)
    one, expected = sequence(prompt(18), max_tokens=8), sequence(prompt(18), max_tokens=8)
    Runner(make()).finish(expected)
    runner, other = Runner(here), Runner(there)
    runner.run((one, 18))
    runner.run((one, 1))
    table = list(one.block_table)
    planes_of(there)[:, :, table] = planes_of(here)[:, :, table]
    for _ in range(3):
        other.run((one, 1))
    planes_of(here)[:, :, table] = planes_of(there)[:, :, table]
    runner.finish(one)
    assert output(one) == output(expected)


def test_sequences_that_break_a_limit_fail_and_leave_the_others_as_they_are(make: Make) -> None:
    engine = make(device_pool=True)
    good, runner = sequence(prompt(20), "good", max_tokens=12), Runner(engine)
    runner.run((good, 20))

    def fails(
        match: str, blocks: list[BlockId], tokens: list[int] | None = None, count: int = 20, **sampling: Any
    ) -> None:
        bad = sequence(tokens or prompt(20), "bad", **sampling)
        bad.take_blocks(blocks)
        runner.give_blocks(good, good.num_tokens)
        newest = Chunk(good.num_tokens - 1, 1, True)
        failed, fine = outcomes_in_order(run_batch(engine, (bad, Chunk(0, count, True)), (good, newest)))
        assert isinstance(failed, SequenceFailed) and match in failed.reason
        assert isinstance(fine, SampledTokens)
        take(engine, good, newest, fine)

    fails("do not hold 20 tokens", block_ids(1))
    fails("leaves the pool of 64", block_ids(1, 64))
    fails("leaves the pool of 64", block_ids(1, -1))
    fails("positions 0 to 21", block_ids(1, 2), count=21)
    fails("token id 384 is not in the vocabulary", block_ids(1, 2), [384] * 20)
    fails("cannot be sampled: token ids leave the vocabulary of 384", block_ids(1, 2), logit_bias={384: 1.0})
    fails("cannot be sampled", block_ids(1, 2), logit_bias={1 << 40: 1.0})
    fails("21 log probabilities are more than 20", block_ids(1, 2), num_logprobs=21)
    banned: dict[str, Any] = {
        "min_tokens": 9,
        "eos_token_ids": list(range(200)),
        "stop_token_ids": list(range(200, 384)),
    }
    fails("leave no token to choose", block_ids(1, 2), **banned)
    expected = sequence(prompt(20), max_tokens=12)
    Runner(make()).finish(expected)
    runner.finish(good)
    assert output(good) == output(expected)


def test_steps_that_are_too_much_together_are_computed_in_parts(make: Make) -> None:
    engine = make(device_pool=True)

    def one(length: int) -> tuple[Sequence, Chunk]:
        made = sequence(prompt(length), "r")
        made.take_blocks(block_ids(*range(20)))
        return made, Chunk(0, length, True)

    with pytest.raises(EngineError, match="without sequences"):
        run_batch(engine)
    # Half of what is too much together may not be: then each sequence gets its tokens.
    for batch in ([one(300), one(300)], [one(20) for _ in range(9)]):
        assert all(isinstance(outcome, SampledTokens) for outcome in outcomes_in_order(run_batch(engine, *batch)))
    expected, again = sequence(prompt(20), max_tokens=4), sequence(prompt(20), max_tokens=4)
    Runner(make()).finish(expected)
    Runner(engine).finish(again)
    assert output(again) == output(expected)


def test_blocks_are_digested_when_their_layer_is_announced(make: Make) -> None:
    """In whole steps, in chunks that end within a block, and in graphs, which announce all layers together."""
    for limits in ({}, {"chunk_graphs": (8, 32)}):
        engine = make(device_pool=True, digests=True, **limits)
        memory, every = engine.memory, range(4)
        assert isinstance(memory, DeviceMemory)
        one, runner = sequence(prompt(45), max_tokens=3), Runner(engine)
        runner.give_blocks(one, 45)
        for chunk in (20, 20, 5):
            announced = Digested(memory, list(one.block_table))
            runner.run((one, chunk), layers=announced)
            assert announced.right == [True] * 4
        expected = fold(digest_blocks(memory.blocks.read(range(8), list(one.block_table))))
        assert memory.digest(every, list(one.block_table)) == expected


class Digested(list[int]):
    """Notes at each announcement of a layer whether its digests are those of its blocks."""

    def __init__(self, memory: DeviceMemory, blocks: list[BlockId]) -> None:
        super().__init__()
        self._memory, self._blocks = memory, blocks
        self.right: list[bool] = []

    def append(self, layer: int) -> None:
        memory = self._memory
        written = [block for block in self._blocks if memory.blocks.words[2 * layer, block].any()]
        words = memory.blocks.read(range(2 * layer, 2 * layer + 2), written)
        self.right.append(memory.digest(range(layer, layer + 1), written) == fold(digest_blocks(words)))


def test_chunks_that_do_not_sample_are_checked_in_graphs_too(make: Make) -> None:
    """A graph of decode steps takes a chunk of one token as well, and its logits are nobody's."""
    engine = make(decode_graphs=(2,))
    weights = engine.launcher.decoder._weights
    embedding = weights.embedding.clone()
    embedding[77] = float("inf")
    engine.launcher.decoder._weights = replace(weights, embedding=embedding)
    decoding, chunked = sequence(prompt(5), "fine"), sequence([77, 1, 2], "broken")
    runner = Runner(engine)
    runner.run((decoding, 5))
    runner.give_blocks(chunked, 1)
    failed, fine = outcomes_in_order(run_batch(engine, (chunked, Chunk(0, 1, False)), (decoding, Chunk(5, 1, True))))
    assert failed == SequenceFailed("the model's hidden states are not finite at position 0")
    assert isinstance(fine, SampledTokens)


def test_logits_that_are_not_finite_fail_their_sequence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    monkeypatch.setattr(engine.launcher.decoder, "sample", _spoiled(engine.launcher.decoder.sample))
    batch = [sequence(prompt(5), "fine"), sequence(prompt(6), "broken")]
    runner, items = Runner(engine), []
    for one in batch:
        runner.give_blocks(one, one.num_tokens)
        items.append((one, Chunk(0, one.num_tokens, True)))
    fine, failed = outcomes_in_order(run_batch(engine, *items))
    assert isinstance(fine, SampledTokens)
    assert failed == SequenceFailed("the model's logits are not finite at output position 0")


def _spoiled(sample: Any) -> Any:
    def with_nan(logits: Any, step: Any) -> Any:
        logits[1, 3] = float("nan")
        return sample(logits, step)

    return with_nan


class BreakingFramework(TorchFramework):
    """A device that a CUDA error may break: then everything that touches it raises, ``synchronize`` too."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.breaks_when = ""
        self.is_broken = False

    def touch(self, when: str) -> None:
        self.is_broken |= self.breaks_when == when
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def copy(self, target: Any, source: Any) -> None:
        self.touch("copied")
        super().copy(target, source)

    def event(self) -> Any:
        return TouchingEvent(self)

    def synchronize(self) -> None:
        if self.is_broken:
            raise DeviceError("CUDA: an illegal memory access was encountered")


class TouchingEvent:
    def __init__(self, framework: BreakingFramework) -> None:
        self._framework = framework

    def record(self, stream: Any) -> None:
        self._framework.touch("recorded")

    def synchronize(self) -> None:
        self._framework.touch("awaited")


@pytest.mark.parametrize("when", ["copied", "recorded", "awaited"])
def test_a_device_that_breaks_is_no_error_of_sequences(when: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    framework = BreakingFramework()
    engine = make(framework)
    one, two, runner = sequence(prompt(20), "one"), sequence(prompt(9), "two"), Runner(engine)
    for each in (one, two):
        runner.give_blocks(each, each.num_tokens)
    framework.breaks_when = when
    for _ in range(2):
        with pytest.raises(DeviceError, match="illegal memory access"):
            run_batch(engine, (one, Chunk(0, 20, True)), (two, Chunk(0, 9, True)))
    caplog.clear()  # tracebacks hold views of the pool


def test_an_error_that_leaves_the_device_whole_is_one_of_sequences(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    monkeypatch.setattr(engine.launcher.decoder, "compute", _out_of_memory)
    one, runner = sequence(prompt(20), "one"), Runner(engine)
    runner.give_blocks(one, 20)
    (failed,) = outcomes_in_order(run_batch(engine, (one, Chunk(0, 20, True))))
    assert isinstance(failed, SequenceFailed) and failed.retryable
    caplog.clear()


def _out_of_memory(*arguments: Any) -> Any:
    raise RuntimeError("CUDA out of memory")


def test_logprobs_of_prompts_with_graphs_and_in_pieces(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that wants some is computed without a graph, and what is computed at once is bounded."""

    def scored(engine: DeviceEngine, chunk: int) -> list[list[PromptLogprobs]]:
        runner, found = Runner(engine), []
        for length in (2, 30, 90):
            one = sequence(prompt(length), f"r{length}", max_tokens=3, num_prompt_logprobs=4)
            pieces: list[PromptLogprobs] = []
            while one.num_output_tokens < 3:
                count = min(chunk, one.num_tokens - one.num_computed_tokens)
                pieces += runner.run((one, count))[0].prompt_logprobs
            found.append(pieces)
        return found

    def joined(pieces: list[PromptLogprobs]) -> tuple[bytes, ...]:
        parts = zip(*((piece.ranks, piece.token_ids) for piece in pieces), strict=True)
        return tuple(b"".join(part) for part in parts)

    plain = make()
    whole = scored(plain, 1000)
    monkeypatch.setattr(prompt_scores, "MAX_LOGITS", 384 * 7)
    graphs = make(decode_graphs=(1, 2), chunk_graphs=(64, 128))
    graphs.warm_up()
    pieces = scored(graphs, 40)
    assert max(len(piece.ranks) // 4 for one in pieces for piece in one) == 7
    assert [joined(one) for one in pieces] == [joined(one) for one in whole]
