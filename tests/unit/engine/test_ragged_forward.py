"""What a token's logits must not depend on: batch, chunks, blocks, where its context was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, open_engine, plan_of, planes_of, sequence, writer_of

from kvrelay.engine.interface import Engine
from kvrelay.errors import EngineError
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SampledTokens, StepPlan


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng([length, seed]).integers(0, 384, length).tolist()
    return tokens


def asked(length: int, **sampling: Any) -> Any:
    return sequence(prompt(length), f"r{length}", **{"max_tokens": 6, "num_logprobs": 3, **sampling})


def assert_same(left: list[SampledTokens], right: list[SampledTokens]) -> None:
    """Compare tokens exactly and log probabilities to what float32 rounding allows."""
    assert [sampled.token_ids for sampled in left] == [sampled.token_ids for sampled in right]
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.top_token_ids == b.top_token_ids
            np.testing.assert_allclose([a.logprob, *a.top_logprobs], [b.logprob, *b.top_logprobs], atol=1e-4)


LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100)


@pytest.fixture
def alone(engine: Engine) -> dict[int, list[SampledTokens]]:
    """Each prompt by itself, in one piece."""
    return {length: Runner(engine).finish(asked(length))[0] for length in LENGTHS}


def test_greedy_tokens_vary(alone: dict[int, list[SampledTokens]]) -> None:
    tokens = [sampled.token_ids[0] for outputs in alone.values() for sampled in outputs]
    assert len(set(tokens)) > 25


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 1000])
def test_batch_and_chunks_do_not_matter(engine: Engine, alone: dict[int, Any], chunk: int) -> None:
    outputs = Runner(engine, seed=chunk).finish(*(asked(length) for length in LENGTHS), chunk=chunk)
    for length, found in zip(LENGTHS, outputs, strict=True):
        assert_same(found, alone[length])


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_size_and_order_of_blocks_do_not_matter(
    tiny_dir: Path, alone: dict[int, Any], block_size: int, kernels: str
) -> None:
    cache = {"block_size": block_size, "num_blocks": 700}
    other = open_engine(tiny_dir, cache=cache, engine={"kernels": kernels})
    outputs = Runner(other, seed=block_size).finish(*(asked(length) for length in LENGTHS), chunk=20)
    for length, found in zip(LENGTHS, outputs, strict=True):
        assert_same(found, alone[length])
    other.close()


def test_decodes_and_prompts_share_a_step_and_results_keep_the_plans_order(
    engine: Engine, alone: dict[int, Any]
) -> None:
    runner = Runner(engine)
    long, short, late = asked(100), asked(15), asked(33)
    outputs: dict[int, list[SampledTokens]] = {100: [], 15: [], 33: []}
    outputs[100] += runner.run((long, 100))
    for step in ([(late, 20), (long, 1), (short, 15)], [(short, 1), (late, 13), (long, 1)]):
        for (one, _), sampled in zip(step, runner.run(*step), strict=True):
            if sampled.token_ids:
                outputs[one.num_prompt_tokens].append(sampled)
    assert [len(outputs[length]) for length in (100, 15, 33)] == [3, 2, 1]
    for length, found in outputs.items():
        assert_same(found, alone[length][: len(found)])


def test_seeded_sampling_does_not_depend_on_batch_or_chunks(engine: Engine) -> None:
    kind = {"temperature": 0.9, "top_p": 0.9, "seed": 11}
    by_itself = [Runner(engine).finish(asked(length, **kind))[0] for length in LENGTHS]
    together = Runner(engine, seed=5).finish(*(asked(length, **kind) for length in LENGTHS), chunk=7)
    for one, other in zip(by_itself, together, strict=True):
        assert_same(one, other)


def test_shared_prefix_blocks_give_what_computing_them_again_would(engine: Engine) -> None:
    runner = Runner(engine)
    first, second = sequence(prompt(48), "a", max_tokens=1), asked(48)
    second.token_ids[40:48] = prompt(8, seed=3)
    again = sequence(list(second.token_ids), "c", max_tokens=6, num_logprobs=3)
    runner.finish(first)
    second.take_blocks(first.block_table[:2])
    second.num_computed_tokens = 32
    assert_same(runner.finish(second)[0], runner.finish(again)[0])


def test_kv_moved_to_another_engine_decodes_on(
    tiny_dir: Path, engine: Engine, alone: dict[int, Any], kernels: str
) -> None:
    other, one = open_engine(tiny_dir, engine={"kernels": kernels}), asked(33)
    assert other.geometry == engine.geometry
    outputs = Runner(engine).run((one, 33))
    there = list(one.block_table)
    one.take_blocks([7, 200, 3, 9])
    planes_of(other)[:, :, one.block_table[: len(there)]] = planes_of(engine)[:, :, there]
    outputs += Runner(other).finish(one)[0]
    assert_same(outputs, alone[33])
    other.close()


def test_a_block_exchanged_between_steps_is_read_in_its_new_place(engine: Engine, alone: dict[int, Any]) -> None:
    runner, one, planes = Runner(engine), asked(33), planes_of(engine)
    outputs = runner.run((one, 33))
    before, after = one.block_table[1], runner.free.pop()
    one.block_table[1] = after
    planes[:, :, after] = planes[:, :, before]
    planes[:, :, before] = 0
    writer_of(engine).replaced(one, [(1, after)])
    outputs += runner.finish(one)[0]
    assert_same(outputs, alone[33])


def test_layers_are_announced_in_order_with_their_kv_in_the_pool(engine: Engine) -> None:
    one = asked(20)
    one.take_blocks([5, 2])
    planes, heard = planes_of(engine), list[int]()

    def on_layers(layers: range) -> None:
        heard.extend(layers)
        assert planes[layers.start : layers.stop][:, :, [5, 2]].any(-1).all()
        assert not planes[layers.stop :].any()

    engine.run(plan_of(engine, (one, Chunk(0, 20, True))), on_layers)
    assert heard == [0, 1, 2, 3]
    assert not np.delete(planes, [5, 2], axis=2).any()


def test_only_sequences_that_sample_get_tokens(engine: Engine) -> None:
    one, other = asked(20), asked(30)
    sampled = Runner(engine).run((one, 10), (other, 30))
    assert sampled[0] == SampledTokens([], []) and len(sampled[1].token_ids) == 1
    assert Runner(engine).run((asked(16), 8)) == [SampledTokens([], [])]


@pytest.mark.parametrize("token", [-1, 384])
def test_a_token_outside_the_vocabulary_is_an_error(engine: Engine, token: int) -> None:
    with pytest.raises(EngineError, match="vocabulary of 384"):
        Runner(engine).run((sequence([3, token]), 2))


def test_an_empty_step_is_an_error(engine: Engine) -> None:
    with pytest.raises(EngineError, match="without sequences"):
        engine.run(StepPlan(step=1, batch=[]), lambda layers: None)
