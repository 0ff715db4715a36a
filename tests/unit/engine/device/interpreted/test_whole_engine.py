from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from engine_runs import Runner, output, planes_of, sequence
from interpreting import sum_in_order

from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder import load_weights
from kvrelay.engine.decoder_config import read_decoder_config
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.frameworks import make_framework
from kvrelay.engine.device.kernels import invariant_attention, invariant_gemm
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine, quantizer
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.protocol.geometry import KVGeometry


def engine(
    path: Path, name: Literal["torch", "paddle"], interpreted: bool, dtype: str = "float32", **options: bool
) -> DeviceEngine:
    """Return an engine with graphs for single tokens and for prompts, and a pool on a simulated device."""
    how = DeviceOptions("cpu", dtype, 16, interpreted, **options)
    config = read_decoder_config(path)
    checkpoint = Checkpoint.open(path, config, lambda done, total: None)
    framework = make_framework(name, "cpu")
    weights = load_weights(checkpoint, DevicePacking(framework, dtype, quantizer(framework, config, how)))
    geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype, checkpoint.digest())
    limits = DeviceEngineLimits(8, 64, 2, 8, decode_graphs=(2,), chunk_graphs=(8,), device_pool=True)
    return build_engine(config, weights, geometry, framework, limits, how)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that are padding hold anything
@pytest.mark.parametrize(
    ("arch", "name", "fp8", "deterministic"),
    [
        ("qwen3", "torch", False, False),
        ("ernie4_5", "torch", False, False),
        ("qwen3", "paddle", False, False),
        ("ernie4_5", "paddle", False, False),
        ("qwen2", "torch", True, False),
        ("qwen2", "torch", False, True),
    ],
)
def test_an_engine_of_interpreted_kernels_gives_the_tokens_of_references(
    arch: str, name: Literal["torch", "paddle"], fp8: bool, deterministic: bool, tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path, arch, overrides={"num_hidden_layers": 2})
    outputs, planes = [], []
    for interpreted in (True, False):
        made = engine(tmp_path, name, interpreted, fp8=fp8, deterministic=interpreted and deterministic)
        greedy = sequence([5, 9, 200, 31, 7], "greedy", max_tokens=3)
        drawn = sequence([8, 1, 77], "drawn", max_tokens=3, temperature=1.0, top_p=0.9, seed=4)
        Runner(made).finish(greedy, drawn)
        outputs.append([output(greedy), output(drawn)])
        planes.append(planes_of(made).view("float32").copy())
        made.close()
    assert outputs[0] == outputs[1]
    np.testing.assert_allclose(planes[0], planes[1], atol=0.1 if fp8 else 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that are padding hold anything
def test_a_deterministic_engine_gives_the_same_bits_in_any_batch_and_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, values and log probabilities: of tokens computed one by one, in chunks, beside others, and again."""
    sum_in_order(monkeypatch.setattr)
    monkeypatch.setattr(invariant_attention, "SPREAD", 2)
    monkeypatch.setattr(invariant_attention, "FAST", invariant_attention.InvariantTiling(16, 16, 16, 4, 1))
    monkeypatch.setattr(invariant_gemm, "FAST", invariant_gemm.GemmTiling(16, 128, 16, 4, 1))
    monkeypatch.setattr(invariant_gemm, "SHORTEST_PIECE", 32)
    monkeypatch.setattr(invariant_gemm, "MOST_SPREAD_ROWS", 4)
    write_tiny_checkpoint(tmp_path, "qwen3", overrides={"num_hidden_layers": 2})
    made = engine(tmp_path, "torch", True, "float16", deterministic=True)
    prompt = np.random.default_rng(0).integers(0, 384, 29).tolist()

    def bits(
        prompt: list[int], num_tokens: int, chunk: int, *others: list[int]
    ) -> tuple[bytes, list[float], list[int]]:
        """Return keys and values of 32 tokens, and log probabilities and tokens from the 29th on."""
        one = sequence(prompt, max_tokens=num_tokens, num_logprobs=2)
        company = [sequence(other, "other", max_tokens=5, temperature=1.0, seed=3) for other in others]
        sampled = Runner(made).finish(one, *company, chunk=chunk)[0]
        rows = [planes_of(made)[:, :, block].reshape(2, 2, 16, -1) for block in one.block_table]
        kv = np.concatenate(rows, 2)[:, :, :32].tobytes()
        return kv, [entry.logprobs[0].logprob for entry in sampled], output(one)

    kv, told, tokens = bits(prompt, 4, 8)
    known = [*prompt, *tokens]
    assert bits(prompt, 4, 4, prompt[:9]) == (kv, told, tokens)
    assert bits(known[:31], 2, 7) == (kv, told[2:], tokens[2:]), (
        "as after preemption: decoded tokens are a prompt's now"
    )
    made.close()
