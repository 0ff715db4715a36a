from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from engine_runs import Runner, output, planes_of, sequence

from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder import load_weights
from kvrelay.engine.decoder_config import read_decoder_config
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.frameworks import make_framework
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.protocol.geometry import KVGeometry


def engine(path: Path, name: Literal["torch", "paddle"], interpreted: bool) -> DeviceEngine:
    """Return an engine with graphs for single tokens and for prompts, and a pool on a simulated device."""
    config = read_decoder_config(path)
    checkpoint = Checkpoint.open(path, config, lambda done, total: None)
    framework = make_framework(name, "cpu")
    weights = load_weights(checkpoint, DevicePacking(framework, "float32"))
    geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32", checkpoint.digest())
    limits = DeviceEngineLimits(8, 64, 2, 8, decode_graphs=(2,), chunk_graphs=(8,), device_pool=True)
    return build_engine(config, weights, geometry, framework, limits, DeviceOptions("cpu", "float32", 16, interpreted))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that are padding hold anything
@pytest.mark.parametrize("name", ["torch", "paddle"])
@pytest.mark.parametrize("arch", ["qwen3", "ernie4_5"])
def test_an_engine_of_interpreted_kernels_gives_the_tokens_of_references(
    arch: str, name: Literal["torch", "paddle"], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path, arch, overrides={"num_hidden_layers": 2})
    outputs, planes = [], []
    for interpreted in (True, False):
        made = engine(tmp_path, name, interpreted)
        greedy = sequence([5, 9, 200, 31, 7], "greedy", max_tokens=3)
        drawn = sequence([8, 1, 77], "drawn", max_tokens=3, temperature=1.0, top_p=0.9, seed=4)
        Runner(made).finish(greedy, drawn)
        outputs.append([output(greedy), output(drawn)])
        planes.append(planes_of(made).view("float32").copy())
        made.close()
    assert outputs[0] == outputs[1]
    np.testing.assert_allclose(planes[0], planes[1], atol=1e-4)
