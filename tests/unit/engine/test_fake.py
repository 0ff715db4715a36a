from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, outcomes_in_order, output, plan_of, planes_of, run_batch, sequence, writer_of

from kvrelay.config.cluster_config import FakeEngineConfig
from kvrelay.engine.fake import FakeEngine, reference_tokens, step_seconds
from kvrelay.errors import ConfigError, EngineError
from kvrelay.node.plans import Chunk
from kvrelay.protocol.ids import BlockId, SequenceId
from kvrelay.protocol.messages.engine import ScheduledTokens, SequenceFailed, StepPlan

CONFIG = FakeEngineConfig()
MakeRunner = Callable[..., Runner]


@pytest.fixture
def make_runner() -> Iterator[MakeRunner]:
    engines: list[FakeEngine] = []

    def make(config: FakeEngineConfig = CONFIG, block_size: int = 4, seed: int = 0, sleep: Any = None) -> Runner:
        engines.append(FakeEngine(config, block_size, 256, sleep or (lambda seconds: None)))
        return Runner(engines[-1], seed)

    yield make
    for engine in engines:
        engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng([length, seed]).integers(0, 1000, length).tolist()
    return tokens


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.0, "top_p": 0.5}])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 50])
def test_tokens_are_the_reference_whatever_the_chunks_and_blocks(
    make_runner: MakeRunner, length: int, sampling: dict[str, Any]
) -> None:
    wanted = reference_tokens(sequence(prompt(length), max_tokens=12, **sampling).spec, CONFIG)
    assert len(set(wanted)) > 8
    for chunk, block_size in ((1, 4), (3, 16), (1000, 1)):
        one = sequence(prompt(length), max_tokens=12, **sampling)
        make_runner(block_size=block_size, seed=chunk).finish(one, chunk=chunk)
        assert output(one) == wanted


def test_tokens_do_not_depend_on_the_batch(make_runner: MakeRunner) -> None:
    sequences = [sequence(prompt(length), f"r{length}", max_tokens=length % 7 + 1) for length in range(1, 30)]
    wanted = [reference_tokens(one.spec, CONFIG) for one in sequences]
    make_runner().finish(*sequences, chunk=5)
    assert [output(one) for one in sequences] == wanted


def test_each_token_of_the_context_matters() -> None:
    base = prompt(20)
    others = [[*base[:index], base[index] + 1, *base[index + 1 :]] for index in range(20)]
    firsts = {tuple(reference_tokens(sequence(tokens, max_tokens=4).spec, CONFIG)) for tokens in [base, *others]}
    assert len(firsts) == 21


def decode_after(make_runner: MakeRunner, damage: Callable[[Runner, Any], None]) -> bool:
    """Run to the second token, do ``damage``, run on; return whether the tokens are still right."""
    runner, one = make_runner(), sequence(prompt(30), max_tokens=3)
    runner.run((one, 30))
    runner.run((one, 1))
    damage(runner, one)
    runner.run((one, 1))
    return output(one) == reference_tokens(one.spec, CONFIG)


def test_without_damage_the_tokens_are_right(make_runner: MakeRunner) -> None:
    assert decode_after(make_runner, lambda runner, one: None)


@pytest.mark.parametrize("layer", range(CONFIG.num_layers))
@pytest.mark.parametrize("kv", [0, 1])
def test_one_flipped_bit_gives_a_wrong_token(make_runner: MakeRunner, layer: int, kv: int) -> None:
    def flip(runner: Runner, one: Any) -> None:
        planes_of(runner.engine)[layer, kv, one.block_table[3], 17] ^= 1

    assert not decode_after(make_runner, flip)


def test_a_block_that_never_arrived_gives_a_wrong_token(make_runner: MakeRunner) -> None:
    def clear(runner: Runner, one: Any) -> None:
        planes_of(runner.engine)[:, :, one.block_table[0]] = 0

    assert not decode_after(make_runner, clear)


def test_exchanged_blocks_give_a_wrong_token(make_runner: MakeRunner) -> None:
    def exchange(runner: Runner, one: Any) -> None:
        table = one.block_table
        table[1], table[2] = table[2], table[1]
        writer_of(runner.engine).replaced(one, [(1, table[1]), (2, table[2])])

    assert not decode_after(make_runner, exchange)


def test_exchanged_keys_and_values_give_a_wrong_token(make_runner: MakeRunner) -> None:
    def exchange(runner: Runner, one: Any) -> None:
        planes = planes_of(runner.engine)
        planes[2, [0, 1], one.block_table[1]] = planes[2, [1, 0], one.block_table[1]]

    assert not decode_after(make_runner, exchange)


def test_a_block_of_another_prompt_gives_a_wrong_token(make_runner: MakeRunner) -> None:
    def stale(runner: Runner, one: Any) -> None:
        other = sequence(prompt(30, seed=9), "other", max_tokens=3)
        runner.run((other, 30))
        planes = planes_of(runner.engine)
        planes[:, :, one.block_table[4]] = planes[:, :, other.block_table[4]]

    assert not decode_after(make_runner, stale)


def test_kv_copied_to_another_engine_decodes_on(make_runner: MakeRunner) -> None:
    source, target, one = make_runner(), make_runner(seed=1), sequence(prompt(30), max_tokens=6)
    source.run((one, 30))
    there = list(one.block_table)
    one.take_blocks(())
    target.give_blocks(one, 30)
    planes_of(target.engine)[:, :, one.block_table] = planes_of(source.engine)[:, :, there]
    target.finish(one)
    assert output(one) == reference_tokens(one.spec, CONFIG)


def test_layers_are_announced_in_order_and_written_by_then(make_runner: MakeRunner) -> None:
    runner, one = make_runner(), sequence(prompt(8), max_tokens=1)
    runner.give_blocks(one, 8)
    planes = planes_of(runner.engine)
    heard: list[int] = []

    def on_layers(layers: range) -> None:
        heard.extend(layers)
        assert planes[layers.start : layers.stop][:, :, one.block_table].any(-1).all()
        assert not planes[layers.stop :].any()

    runner.engine.run(plan_of(runner.engine, (one, Chunk(0, 8, True))), on_layers)
    assert heard == list(range(CONFIG.num_layers))


def test_eos_comes_about_as_often_as_configured() -> None:
    config = FakeEngineConfig(eos_every=8)
    asked: dict[str, Any] = {"eos_token_ids": [7], "ignore_eos": False, "max_tokens": 400}
    lengths = [len(reference_tokens(sequence(prompt(5, seed), **asked).spec, config)) for seed in range(200)]
    assert 6 < np.mean(lengths) < 10
    never = reference_tokens(sequence(prompt(5), **asked).spec, FakeEngineConfig(eos_every=0, vocab_size=50))
    assert len(never) == 400 and 7 not in never
    ignored = reference_tokens(sequence(prompt(5), **{**asked, "ignore_eos": True}).spec, config)
    assert len(ignored) == 400


def test_min_tokens_holds_eos_back() -> None:
    config = FakeEngineConfig(eos_every=1)
    asked: dict[str, Any] = {"eos_token_ids": [7], "ignore_eos": False, "max_tokens": 50, "min_tokens": 10}
    tokens = reference_tokens(sequence(prompt(5), **asked).spec, config)
    assert len(tokens) == 11 and tokens.index(7) == 10


def test_logprobs_depend_on_the_context_alone(make_runner: MakeRunner) -> None:
    first, second = (sequence(prompt(20), num_logprobs=2, max_tokens=5) for _ in range(2))
    (alone,) = make_runner().finish(first, chunk=3)
    batched, _ = make_runner(seed=4).finish(second, sequence(prompt(9), "other", max_tokens=5))
    assert alone == batched
    assert len({sampled.logprobs[0].logprob for sampled in alone}) == 5
    assert alone[0].logprobs[0].top_token_ids[0] == alone[0].token_ids[0]


def test_a_step_takes_what_the_cost_model_says(make_runner: MakeRunner) -> None:
    config = FakeEngineConfig(step_s=1.0, prefill_token_s=0.1, decode_token_s=0.01, context_token_s=0.001)
    slept: list[float] = []
    runner, one, other = make_runner(config, sleep=slept.append), sequence(prompt(20)), sequence(prompt(5), "o")
    runner.run((one, 20))
    assert slept == pytest.approx([(1 + 2 + 0.02) / 4] * 4)
    slept.clear()
    batch = [ScheduledTokens(SequenceId(1), 20, 1, True, 20), ScheduledTokens(SequenceId(2), 0, 5, True, 0)]
    assert step_seconds(config, batch) == pytest.approx(1 + 0.5 + 0.01 + 0.026)
    runner.run((one, 1), (other, 5))
    assert sum(slept) == pytest.approx(step_seconds(config, batch))


@pytest.mark.parametrize(
    ("start", "count", "table", "fault"),
    [
        (0, 0, [0, 1], "positions 0 to 0"),
        (0, 9, [0, 1, 2], "positions 0 to 9 of 8"),
        (0, 8, [0], "do not hold 8"),
        (0, 8, [0, 256], "leaves the pool"),
        (0, 8, [0, -1], "leaves the pool"),
    ],
)
def test_a_sequence_beside_the_pool_fails_alone(
    make_runner: MakeRunner, start: int, count: int, table: list[BlockId], fault: str
) -> None:
    runner, one, other = make_runner(), sequence(prompt(8), "bad"), sequence(prompt(9))
    one.take_blocks(table)
    runner.give_blocks(other, 9)
    batch = [(one, Chunk(start, count, False)), (other, Chunk(0, 9, True))]
    outcomes = outcomes_in_order(run_batch(runner.engine, *batch))
    assert isinstance(outcomes[0], SequenceFailed) and fault in outcomes[0].reason
    assert outcomes[1] == make_runner().run((sequence(prompt(9)), 9))[0]


def test_a_step_of_which_nothing_can_be_computed_tells_no_layer(make_runner: MakeRunner) -> None:
    runner, one = make_runner(), sequence([5, 1024])
    layers: list[int] = []
    runner.give_blocks(one, 2)
    result = run_batch(runner.engine, (one, Chunk(0, 2, True)), layers=layers)
    assert outcomes_in_order(result) == [SequenceFailed("token id 1024 is not in the vocabulary of 1024")]
    assert layers == []


def test_what_is_known_of_a_sequence_is_forgotten_when_it_leaves(make_runner: MakeRunner) -> None:
    runner = make_runner()
    for number in range(5):
        one = sequence(prompt(8, number), f"r{number}", max_tokens=2)
        runner.finish(one)
        assert isinstance(runner.engine, FakeEngine)
        assert len(runner.engine._sequences) == len(runner.engine._contexts) == 1
        writer_of(runner.engine).leave(one)


def test_an_empty_step_is_an_error(make_runner: MakeRunner) -> None:
    with pytest.raises(EngineError, match="without sequences"):
        make_runner().engine.run(StepPlan(step=1, batch=[]), lambda layers: None)


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_broken_token_fails_its_sequence_in_the_step_that_computes_it(make_runner: MakeRunner, chunk: int) -> None:
    """What that step writes is wrong from its first position on: who reads such blocks gets other tokens."""
    config = FakeEngineConfig(broken_token=500, eos_every=0)
    clean = prompt(12)
    runner, one, other = make_runner(config), sequence([*clean[:8], 500, *clean[8:]]), sequence(clean, max_tokens=5)
    with pytest.raises(EngineError, match="not finite at position 8"):
        runner.finish(one, chunk=chunk)
    runner.finish(other)
    assert output(other) == reference_tokens(other.spec, config)
    spoilt = sequence(clean, max_tokens=5)
    spoilt.take_blocks(one.block_table)
    spoilt.num_computed_tokens = 8
    runner.finish(spoilt)
    assert output(spoilt) != output(other)


def test_a_geometry_without_whole_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        FakeEngine(FakeEngineConfig(num_kv_heads=1, head_dim=4), 4, 8)


def test_a_sequence_too_long_for_the_model_is_an_error(make_runner: MakeRunner) -> None:
    runner = make_runner(FakeEngineConfig(max_model_len=7))
    with pytest.raises(EngineError, match="more than the model's 7"):
        runner.run((sequence(prompt(8)), 8))
