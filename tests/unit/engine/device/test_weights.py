"""Weights of the device engine: from files as they are stored, and random ones of any shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from engine_runs import Runner, node_config, open_engine, output, sequence

from kvrelay.engine.checkpoint import expected_shapes
from kvrelay.engine.decoder_config import parse_decoder_config
from kvrelay.engine.device.frameworks import make_framework
from kvrelay.engine.device.load import DeviceOptions, quantizer
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.engine.geometry import node_geometry
from kvrelay.engine.load import load_engine
from kvrelay.engine.presets import SHAPES, write_shape
from kvrelay.engine.safetensors_file import StoredTensor, read_safetensors, write_safetensors
from kvrelay.engine.tiny import tiny_config, write_tiny_checkpoint
from kvrelay.errors import ConfigError


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_parts_go_from_the_file_to_their_places(
    name: Literal["torch", "paddle"], stored: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: np.random.default_rng(rows).standard_normal((rows, 5), np.float32) for name, rows in PARTS.items()}
    write_safetensors(tmp_path / "w", {name: (rows, 5) for name, rows in PARTS.items()}, stored, values.__getitem__)
    tensors = read_safetensors(tmp_path / "w")
    expected = np.concatenate([tensors[name].float32() for name in PARTS])
    monkeypatch.delattr(StoredTensor, "float32")
    packed = DevicePacking(make_framework(name, "cpu"), dtype).upload_stored([tensors[part] for part in PARTS])
    rounded = torch.from_numpy(expected).to(getattr(torch, dtype)).float()
    assert np.array_equal(packed.astype("float32").numpy() if name == "paddle" else packed.float(), rounded)


PARTS = {"q": 3, "k": 2, "v": 4}


@pytest.mark.parametrize("kind", ["torch", "paddle-device"])
def test_random_weights_need_a_config_alone_and_are_the_same_each_time(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3")))
    model = {"load_format": "dummy", "max_model_len": 128}
    outputs = []
    for _ in range(2):
        engine = open_engine(tmp_path, model=model, engine={"kind": kind})
        one = sequence([5, 9, 200], max_tokens=8, temperature=1.0)
        Runner(engine).finish(one)
        outputs.append(output(one))
        geometry = engine.geometry
        engine.close()
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 1
    node = node_config(tmp_path, model=model, engine={"kind": kind})
    assert node_geometry(node, lambda done, total: None) == geometry
    other = node_config(tmp_path, model={**model, "dtype": "bfloat16"}, engine={"kind": kind})
    assert node_geometry(other, lambda done, total: None).model_digest != geometry.model_digest


def test_paddle_makes_no_random_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dummy needs engine\.kind: torch"):
        load_engine(node_config(tmp_path, model={"load_format": "dummy"}), lambda done, total: None)


@pytest.mark.parametrize(
    ("preset", "millions"), [("qwen2-0.5b", 494), ("qwen3-0.6b", 596), ("llama3-8b", 8030), ("qwen3-8b", 8191)]
)
def test_presets_have_the_size_of_their_models(preset: str, millions: int) -> None:
    shapes = expected_shapes(parse_decoder_config({"hidden_act": "silu", **SHAPES[preset]}))
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6) == millions


def test_a_shape_has_a_config_and_a_tokenizer_of_its_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_shape(tmp_path, "qwen2-0.5b")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 151936
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 151936
    with pytest.raises(ConfigError, match="'qwen9' is unknown"):
        write_shape(tmp_path, "qwen9")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_linear_layers_but_the_head_in_float8(load_format: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "llama")
    model = {"load_format": load_format, "max_model_len": 128}
    engines = [
        open_engine(tmp_path, model=model, engine={"kind": "torch", "quantization": kind}) for kind in ("none", "fp8")
    ]
    plain, quantized = (engine.launcher.decoder._weights for engine in engines)  # type: ignore[attr-defined]
    for before, after in zip(plain.layers, quantized.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            linear, reference = getattr(after, name), getattr(before, name).weight.float()
            assert linear.weight.dtype == torch.float8_e4m3fn
            rounded = linear.weight.float() * linear.scales
            assert torch.allclose(rounded.abs().amax(1), reference.abs().amax(1), rtol=1e-6)
            assert 0 < float((rounded - reference).norm() / reference.norm()) < 0.04
    assert quantized.lm_head.scales is None
    assert torch.equal(quantized.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(quantized.embedding, plain.embedding)
    digests = {engine.geometry.model_digest for engine in engines}
    assert len(digests) == 2
    for kind, engine in zip(("none", "fp8"), engines, strict=True):
        node = node_config(tmp_path, model=model, engine={"kind": "torch", "quantization": kind})
        assert node_geometry(node, lambda done, total: None) == engine.geometry
        engine.close()


def test_float8_needs_a_card_a_type_and_sizes_that_its_gemm_takes(tmp_path: Path) -> None:
    config = parse_decoder_config({**tiny_config("llama"), "hidden_size": 72, "head_dim": 18})
    framework = TorchFramework("cpu")
    framework.is_gpu, framework.has_fp8 = True, False
    with pytest.raises(ConfigError) as caught:
        quantizer(framework, config, DeviceOptions("gpu", "float16", 16, fp8=True))
    assert [problem.partition(" fp8 ")[2].split()[0] for problem in caught.value.problems] == [
        "needs",
        "computes",
        "needs",
    ]
