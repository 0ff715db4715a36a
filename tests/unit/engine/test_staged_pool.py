"""The copying between a device's pool and the node's memory, with the CPU in the place of the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_runs import Runner, open_engine, output, planes_of, sequence

from kvrelay.engine import kv_pool, portable
from kvrelay.engine.interface import Engine


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng([length, seed]).integers(0, 384, length).tolist()
    return tokens


@pytest.fixture
def staged(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with monkeypatch.context() as patch:
        patch.setattr(portable, "MappedPool", kv_pool.StagedPool)
        loaded = open_engine(tiny_dir, engine={"kernels": "portable"})
    yield loaded
    loaded.close()


@pytest.fixture
def kernels() -> str:
    """Staging is for devices, which have the portable kernels only."""
    return "portable"


def wanted(engine: Engine, tokens: list[int], count: int = 6) -> list[int]:
    one = sequence(tokens, max_tokens=count)
    Runner(engine).finish(one)
    return output(one)


def test_tokens_and_memory_are_those_of_a_mapped_pool(staged: Engine, engine: Engine) -> None:
    outputs = []
    for runner in (Runner(staged), Runner(engine)):
        batch = [sequence(prompt(length), f"r{length}", max_tokens=6) for length in (3, 16, 40)]
        runner.finish(*batch, chunk=9)
        outputs.append([output(one) for one in batch])
    assert outputs[0] == outputs[1]
    ours, theirs = (planes_of(one).view(np.float32) for one in (staged, engine))
    assert ours.any()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_layer_is_in_the_memory_when_it_is_announced(staged: Engine) -> None:
    runner, one = Runner(staged), sequence(prompt(20), max_tokens=1)
    runner.give_blocks(one, 20)
    seen: list[bool] = []

    class Heard(list[int]):
        def append(self, layer: int) -> None:
            planes = planes_of(staged)
            seen.append(bool(planes[layer][:, one.block_table].any(-1).all()) and not planes[layer + 1 :].any())

    runner.run((one, 20), layers=Heard())
    assert seen == [True] * 4


def test_kv_that_a_transfer_wrote_is_used(staged: Engine, engine: Engine) -> None:
    one = sequence(prompt(33), max_tokens=6)
    Runner(engine).run((one, 33))
    there, runner = list(one.block_table), Runner(staged, seed=3)
    one.take_blocks(())
    runner.give_blocks(one, 33)
    planes_of(staged)[:, :, one.block_table] = planes_of(engine)[:, :, there]
    runner.finish(one)
    assert output(one) == wanted(engine, prompt(33))


def test_a_block_reused_for_another_request_is_read_anew(staged: Engine, engine: Engine) -> None:
    runner, source = Runner(staged), Runner(engine)
    first = sequence(prompt(33), "first", max_tokens=3)
    runner.finish(first)
    second = sequence(prompt(33, seed=8), "second", max_tokens=6)
    source.run((second, 33))
    planes_of(staged)[:, :, first.block_table] = planes_of(engine)[:, :, second.block_table]
    second.take_blocks(first.block_table)
    runner.finish(second)
    assert output(second) == wanted(engine, prompt(33, seed=8))


def test_a_block_that_grew_elsewhere_is_read_anew(staged: Engine, engine: Engine) -> None:
    here, there = Runner(staged), Runner(engine)
    one = sequence(prompt(18), "moved", max_tokens=8)
    here.run((one, 18))
    here.run((one, 1))
    away = list(one.block_table)
    planes_of(engine)[:, :, away] = planes_of(staged)[:, :, away]
    for _ in range(3):
        there.run((one, 1))
    planes_of(staged)[:, :, away] = planes_of(engine)[:, :, away]
    here.finish(one)
    assert output(one) == wanted(engine, prompt(18), 8)
