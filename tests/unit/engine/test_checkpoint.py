from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import node_config, open_engine

from kvrelay.engine.checkpoint import Checkpoint, expected_shapes
from kvrelay.engine.decoder_config import parse_decoder_config, read_decoder_config, read_eos_token_ids
from kvrelay.engine.load import load_engine
from kvrelay.engine.safetensors_file import read_safetensors, write_safetensors
from kvrelay.engine.tiny import tiny_config, write_tiny_checkpoint
from kvrelay.errors import CheckpointError, ConfigError


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a checkpoint."""
    file = path / "model.safetensors"
    tensors = {name: tensor.float32().copy() for name, tensor in read_safetensors(file).items()}
    change(tensors)
    write_safetensors(file, {name: value.shape for name, value in tensors.items()}, "F32", lambda name: tensors[name])


def loading_error(path: Path, **sections: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_engine(path, **sections)
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path, "qwen3")
    return tmp_path


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_missing_tensor_is_named_with_its_shape(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))
    assert "model.layers.1.self_attn.k_norm.weight [16] is missing" in loading_error(model)


def test_an_unknown_tensor_is_named(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({"model.layers.0.extra": np.zeros((2, 3), np.float32)}))
    assert "model.layers.0.extra [2, 3] is not part of the model" in loading_error(model)


def test_a_misshapen_tensor_is_named_with_both_shapes(model: Path) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((191, 96), np.float32)

    rewrite(model, cut)
    assert "model.layers.2.mlp.up_proj.weight is [191, 96], the config says [192, 96]" in loading_error(model)


def test_many_problems_are_counted(model: Path) -> None:
    edit_config(model, num_hidden_layers=6)
    assert "and 14 more" in loading_error(model)


def test_tensors_that_say_nothing_new_are_ignored(model: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    rewrite(model, add)
    open_engine(model).close()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "cannot read"),
        (b"abc", "not a sound"),
        (b"\xff" * 64, "longer than the file"),
        (b"\x02\0\0\0\0\0\0\0{]", "not a sound"),
        (b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}', "a has no dtype"),
    ],
)
def test_a_damaged_file_is_named(model: Path, content: bytes, fault: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    message = loading_error(model)
    assert fault in message and "model.safetensors" in message


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "of type I64; supported are F32, F16, BF16"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "outside of the file"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "outside of the file"),
    ],
)
def test_a_tensor_that_contradicts_its_file_is_named(tmp_path: Path, entry: dict[str, Any], fault: str) -> None:
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=fault):
        read_safetensors(file)


def test_a_truncated_shard_is_an_error(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "outside of the file" in loading_error(model)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "config.json: No such file" in loading_error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in loading_error(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in loading_error(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    assert "model.safetensors" in loading_error(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "weight_map should be an object" in loading_error(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, M",
        ),
        ({"architectures": None}, "None is not supported"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported; supported are silu"),
        (
            {"rope_scaling": {"type": "su"}},
            "'su' is not supported; supported are default, linear, dynamic, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a number factor, not None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": "96"}, "hidden_size should be a positive integer, not '96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers should be"),
        ({"num_key_value_heads": 4}, "6 attention heads are not a multiple of 4"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "each of 4 layers"),
    ],
)
def test_a_config_this_engine_cannot_run_says_why(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        parse_decoder_config({**tiny_config("qwen2"), **change})


def test_rope_parameters_by_layer_type_meet_the_layers_there_are() -> None:
    linear, sliding = {"rope_type": "linear", "factor": 2.0}, {"use_sliding_window": True, "max_window_layers": 2}
    both = {"rope_parameters": {"full_attention": linear, "sliding_attention": {"rope_type": "default"}}}
    assert parse_decoder_config({**tiny_config("qwen2"), **both}).rope.kind == "linear"
    with pytest.raises(CheckpointError, match="differs between layers"):
        parse_decoder_config({**tiny_config("qwen2"), **both, **sliding})
    assert (
        parse_decoder_config({**tiny_config("mistral", overrides={"sliding_window": 7}), **both}).rope.kind == "default"
    )


def test_files_may_begin_with_a_byte_order_mark(model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (model / name).write_text((model / name).read_text(), "utf-8-sig")
    assert read_decoder_config(model) == parse_decoder_config(tiny_config("qwen3"))
    assert read_eos_token_ids(model) == [2]


def test_windows_follow_the_config() -> None:
    def windows(arch: str, **overrides: Any) -> tuple[int | None, ...]:
        return parse_decoder_config(tiny_config(arch, overrides=overrides)).windows

    sliding = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("mistral", sliding_window=7) == (7,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("qwen2", sliding_window=9) == (None,) * 4
    assert windows("qwen2", **sliding, max_window_layers=3) == (None, None, None, 9)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert windows("qwen3", **sliding, layer_types=kinds, max_window_layers=4) == (None, 9, None, 9)


@pytest.mark.parametrize("section", [{"model": {"dtype": "bfloat16"}}, {"cache": {"dtype": "float16"}}])
def test_a_type_paddle_cannot_compute_in_on_a_cpu_is_refused(model: Path, section: dict[str, Any]) -> None:
    assert "use auto or float32" in loading_error(model, **section, engine={"kernels": "portable"})


def test_gpu_is_refused_clearly(model: Path) -> None:
    assert "Paddle built for GPUs" in loading_error(model, engine={"device": "gpu"})


def test_max_model_len_is_bounded_by_the_checkpoint(model: Path) -> None:
    assert "5000 is more than the 4096" in loading_error(model, model={"max_model_len": 5000})
    engine = open_engine(model, model={"max_model_len": 50})
    assert engine.max_model_len == 50
    engine.close()
    edit_config(model, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    engine = open_engine(model, model={"max_model_len": 5000})
    assert engine.max_model_len == 5000
    engine.close()


def test_progress_is_told_in_bytes_and_ends_at_the_total(model: Path) -> None:
    told: list[tuple[int, int]] = []
    load_engine(node_config(model), lambda done, total: told.append((done, total))).close()
    sizes = [tensor.raw.nbytes for tensor in read_safetensors(model / "model.safetensors").values()]
    assert told[-1] == (sum(sizes), sum(sizes))
    assert len(told) == len(sizes) and told == sorted(told)


def digest(path: Path, **sections: Any) -> str:
    engine = open_engine(path, **sections)
    engine.close()
    return engine.geometry.model_digest


def test_the_digest_tells_models_apart_and_knows_the_same_one_again(tmp_path: Path) -> None:
    def written(name: str, **settings: Any) -> Path:
        write_tiny_checkpoint(tmp_path / name, "qwen2", **settings)
        return tmp_path / name

    first = digest(written("a"))
    assert first == digest(written("b"))
    assert first == digest(written("c", max_shard_bytes=100_000), cache={"num_blocks": 8})
    assert first != digest(written("d", seed=1))
    assert first != digest(written("e", overrides={"rope_theta": 20000.0}))
    rewrite(tmp_path / "b", lambda tensors: tensors["model.norm.weight"].__setitem__(5, 1.0))
    assert first != digest(tmp_path / "b")


def test_the_digest_of_dynamic_rope_depends_on_the_served_length(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "llama", overrides={"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    short, long = ({"max_model_len": length} for length in (4096, 8192))
    assert digest(tmp_path, model=short) != digest(tmp_path, model=long)


@pytest.mark.parametrize(("dtype", "error"), [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_each_type_on_disk_is_read_as_the_values_it_holds(tmp_path: Path, dtype: str, error: float) -> None:
    values = np.random.default_rng(0).normal(0, 1, (7, 5)).astype(np.float32)
    write_safetensors(tmp_path / "w", {"w": (7, 5)}, dtype, lambda name: values)
    found = read_safetensors(tmp_path / "w")["w"].float32()
    assert found.shape == (7, 5) and found.dtype == np.float32
    assert np.all(np.abs(found - values) <= np.abs(values) * error)


def test_eos_ids_come_from_the_generation_config_first(model: Path) -> None:
    assert read_eos_token_ids(model) == [2]
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_eos_token_ids(model) == [5, 6]
    (model / "generation_config.json").unlink()
    assert read_eos_token_ids(model) == [2]
    edit_config(model, eos_token_id=None)
    assert read_eos_token_ids(model) == []


def test_taking_a_tensor_twice_gives_it_twice(model: Path) -> None:
    config = parse_decoder_config(json.loads((model / "config.json").read_text()))
    checkpoint = Checkpoint.open(model, config, lambda done, total: None)
    name = "model.embed_tokens.weight"
    assert checkpoint.take(name).shape == expected_shapes(config)[name] == checkpoint.take(name).shape


def test_an_unknown_arch_or_preset_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arch 'gpt' is unknown; there are qwen2, qwen3, llama, mistral, ernie4_5"):
        write_tiny_checkpoint(tmp_path, "gpt")
    with pytest.raises(ConfigError, match=r"preset 'huge' is unknown; there are tiny, qwen2-0\.5b"):
        write_tiny_checkpoint(tmp_path, "qwen2", preset="huge")
    with pytest.raises(ConfigError, match="vocab_size 100 is below"):
        write_tiny_checkpoint(tmp_path, "qwen2", overrides={"vocab_size": 100})


def test_tiny_weights_are_the_same_everywhere(model: Path) -> None:
    raw = read_safetensors(model / "model.safetensors")["model.layers.3.mlp.down_proj.weight"].raw
    assert raw[0, :3].tolist() == [0.07535858452320099, 0.0772361010313034, -0.03672150522470474]


def test_tiny_tokenizer_round_trips_any_text_and_names_every_id(model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "Hello, wörld! 你好 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == json.loads((model / "config.json").read_text())["vocab_size"]
    assert tokenizer.encode("<|user|>hi<|end|>").ids[0] == 4
    settings = json.loads((model / "tokenizer_config.json").read_text())
    assert "add_generation_prompt" in settings["chat_template"]
