"""``cache.num_blocks: auto``: what is left of the device's memory beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import Runner, node_config, output, sequence

from kvrelay.engine.decoder_config import parse_decoder_config
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine
from kvrelay.engine.device.pool_size import BYTES_PER_GRAPH, num_blocks_that_fit
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.weights import RandomWeights
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import tiny_config
from kvrelay.errors import ConfigError
from kvrelay.protocol.geometry import KVGeometry

MIB = 1 << 20


class MeasuredFramework(TorchFramework):
    """A device with ``free`` of ``total`` bytes when the largest step has been computed."""

    def __init__(self, free: int, total: int) -> None:
        super().__init__("cpu")
        self.free, self.total = free, total
        self.released = False

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def release_memory(self) -> None:
        self.released = True


class Case:
    def __init__(self, free: int, total: int) -> None:
        self.config = parse_decoder_config(tiny_config("qwen3"))
        self.framework = MeasuredFramework(free, total)
        self.geometry = KVGeometry(4, 2, 16, 16, "float32", "random")
        self.made: list[DeviceEngineLimits] = []
        self.shapes: list[tuple[int, int]] = []

    def make(self, limits: DeviceEngineLimits) -> DeviceEngine:
        weights = RandomWeights(self.framework, self.config, "float32").make()
        options = DeviceOptions("cpu", "float32", 16)
        engine = build_engine(self.config, weights, self.geometry, self.framework, limits, options)
        self.made.append(limits)
        compute = engine.launcher.decoder.compute

        def spy(step: Any, *rest: Any, **options: Any) -> Any:
            self.shapes.append((step.shape.rows, step.shape.samples))
            return compute(step, *rest, **options)

        engine.launcher.decoder.compute = spy  # type: ignore[method-assign]
        return engine

    def fit(self, share: float, **limits: Any) -> int:
        sizes = {"max_model_len": 100, "max_num_seqs": 8, "max_num_batched_tokens": 250, **limits}
        asked = DeviceEngineLimits(num_blocks=0, decode_graphs=(1, 2, 8), chunk_graphs=(16, 64), **sizes)
        return num_blocks_that_fit(self.make, self.framework, self.geometry, asked, share)


def test_the_pool_takes_what_is_free_after_the_largest_step() -> None:
    case = Case(free=700 * MIB, total=1000 * MIB)
    num_blocks = case.fit(share=0.8)
    (probe,) = case.made
    assert (probe.decode_graphs, probe.chunk_graphs) == ((8,), (64,))
    assert case.shapes == [(250, 3)]
    assert case.framework.released
    room = 500 * MIB + probe.num_blocks * case.geometry.block_bytes - 5 * BYTES_PER_GRAPH
    assert room - case.geometry.block_bytes < num_blocks * case.geometry.block_bytes <= room


def test_a_device_that_holds_no_longest_sequence_is_refused() -> None:
    case = Case(free=100 * MIB, total=1000 * MIB)
    with pytest.raises(ConfigError, match=r"room for 0 blocks of .* lower model\.max_model_len"):
        case.fit(share=0.9)


@pytest.mark.parametrize("kind", ["paddle", "fake", "torch", "paddle-device"])
def test_auto_is_for_gpus(kind: str, tiny_dir: Path) -> None:
    node = node_config(tiny_dir, cache={"num_blocks": "auto"}, engine={"kind": kind})
    with pytest.raises(ConfigError, match=r"auto needs engine\.kind: torch or paddle-device, and engine\.device: gpu"):
        load_engine(node, lambda done, total: None)


def test_an_engine_goes_on_after_its_largest_step() -> None:
    case = Case(0, 0)
    limits = DeviceEngineLimits(64, 512, 8, 512)
    outputs = []
    for first in (True, False):
        engine = case.make(limits)
        if first:
            engine.compute_largest_step()
        one = sequence([4, 7, 1], max_tokens=5)
        Runner(engine).finish(one)
        outputs.append(output(one))
        engine.close()
    assert outputs[0] == outputs[1]
