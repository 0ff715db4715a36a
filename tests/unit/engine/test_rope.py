from __future__ import annotations

import numpy as np
import pytest

from kvrelay.engine.rope import (
    RopeConfig,
    Rotation,
    RotationTables,
    half_split_order,
    inverse_frequencies,
    rotation_tables,
)
from kvrelay.errors import CheckpointError


def turned(x: np.ndarray, position: int, inverse: np.ndarray) -> np.ndarray:
    """Turn x [D] the way the kernels do."""
    cosine, sine = rotation_tables(Rotation(inverse, 1.0), np.array([position]), 1)
    out: np.ndarray = x * cosine[0, 0] + np.roll(x, len(x) // 2) * sine[0, 0]
    return out


def test_turning_is_a_complex_rotation_of_pairs_of_halves() -> None:
    inverse, _ = inverse_frequencies(RopeConfig(), 8, 100)
    x = np.random.default_rng(0).normal(size=8)
    pairs = (x[:4] + 1j * x[4:]) * np.exp(1j * 13 * inverse)
    np.testing.assert_allclose(turned(x, 13, inverse), np.concatenate([pairs.real, pairs.imag]), rtol=1e-5)


def test_products_depend_on_the_distance_only() -> None:
    inverse, _ = inverse_frequencies(RopeConfig(), 16, 100)
    query, key = np.random.default_rng(1).normal(size=(2, 16))
    near = turned(query, 9, inverse) @ turned(key, 4, inverse)
    far = turned(query, 1009, inverse) @ turned(key, 1004, inverse)
    assert near == pytest.approx(far, rel=1e-3)
    assert near != pytest.approx(query @ key, rel=1e-2)


def test_interleaved_pairs_become_halves() -> None:
    assert half_split_order(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_linear_divides_every_frequency() -> None:
    plain, _ = inverse_frequencies(RopeConfig(), 16, 100)
    slowed, _ = inverse_frequencies(RopeConfig(kind="linear", factor=4.0), 16, 100)
    np.testing.assert_allclose(slowed * 4, plain)


def test_dynamic_changes_only_beyond_the_original_length() -> None:
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position=64)
    plain, _ = inverse_frequencies(RopeConfig(), 16, 64)
    within, _ = inverse_frequencies(rope, 16, 64)
    beyond, _ = inverse_frequencies(rope, 16, 128)
    np.testing.assert_array_equal(within, plain)
    assert beyond[0] == plain[0] and np.all(beyond[1:] < plain[1:])
    # the slowest pair of 64 turns as far over 128 as with the plain base stretched by factor * 2 - 1 = 3
    assert plain[-1] / beyond[-1] == pytest.approx(3.0, rel=1e-5)


def test_llama3_keeps_fast_pairs_and_slows_slow_ones() -> None:
    rope = RopeConfig(kind="llama3", factor=8.0, original_max_position=64)
    plain, _ = inverse_frequencies(RopeConfig(), 32, 100)
    scaled, _ = inverse_frequencies(rope, 32, 100)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 2.0, "mscale_all_dim": 2.0}, 1.0),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_scales_attention(settings: dict[str, float], factor: float) -> None:
    rope = RopeConfig(**{"kind": "yarn", "factor": 4.0, "original_max_position": 64, **settings})  # type: ignore[arg-type]
    assert inverse_frequencies(rope, 32, 100)[1] == pytest.approx(factor)


def test_both_spellings_of_the_config_mean_the_same() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    old = RopeConfig.parse({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}}, 256)
    new = RopeConfig.parse(
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}}, 256
    )
    assert old == new and old.theta == 5e5 and old.original_max_position == 64


def test_tables_by_position_grow_and_hold_what_they_held() -> None:
    rotation = Rotation(inverse_frequencies(RopeConfig(), 16, 100)[0], 1.5)
    tables = RotationTables(rotation)
    first = [table[:700].copy() for table in tables.up_to(700)]
    for grown, before in zip(tables.up_to(5000), first, strict=True):
        assert grown.shape[0] >= 5000
        np.testing.assert_array_equal(grown[:700], before)
    cosine, _ = rotation.half_tables(np.array([4999]))
    np.testing.assert_array_equal(tables.up_to(10)[0][4999], cosine[0])


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    "layer_types", [["full_attention"], ["sliding_attention"], ["full_attention", "sliding_attention"]]
)
def test_parameters_by_layer_type_that_agree_are_those_of_all_layers(layer_types: list[str]) -> None:
    flat = RopeConfig.parse({"rope_theta": 5e5, "rope_parameters": LINEAR}, 256)
    without_theta = {key: value for key, value in LINEAR.items() if key != "rope_theta"}
    nested = {"full_attention": LINEAR, "sliding_attention": without_theta}
    assert flat.kind == "linear" and flat.theta == 5e5
    assert RopeConfig.parse({"rope_theta": 5e5, "rope_parameters": nested}, 256, layer_types) == flat
    beside = {"rope_theta": 5e5, "full_attention": without_theta, "sliding_attention": without_theta}
    assert RopeConfig.parse({"rope_theta": 1e4, "rope_parameters": beside}, 256, layer_types) == flat


def test_parameters_of_layer_types_that_the_model_does_not_have_are_not_used() -> None:
    nested = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}, "chunked_attention": None}
    assert RopeConfig.parse({"rope_theta": 1e4, "rope_parameters": nested}, 256).kind == "linear"


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"full_attention": LINEAR, "sliding_attention": {**LINEAR, "factor": 4.0}}, "rope_parameters differs between"),
        ({"full_attention": LINEAR}, "no parameters for sliding_attention, only for full_attention"),
        ({"full_attention": LINEAR, "sliding_attention": None}, "no parameters for sliding_attention"),
        ([LINEAR], "rope_parameters should be an object"),
        ({**LINEAR, "beta_fast": [1]}, "needs a number beta_fast"),
    ],
)
def test_parameters_that_no_one_rotation_meets_are_refused(parameters: object, fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        RopeConfig.parse(
            {"rope_theta": 1e4, "rope_parameters": parameters}, 256, ["full_attention", "sliding_attention"]
        )


def test_a_null_rope_type_leaves_the_old_key_to_say_it() -> None:
    scaling = {"rope_type": None, "type": "linear", "factor": 2.0}
    assert RopeConfig.parse({"rope_theta": 1e4, "rope_scaling": scaling}, 256).kind == "linear"
    assert RopeConfig.parse({"rope_theta": 1e4, "rope_scaling": {"rope_type": None}}, 256).kind == "default"


def test_scaling_goes_before_parameters_as_in_transformers() -> None:
    both = {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 5.0},
    }
    rope = RopeConfig.parse(both, 256)
    assert (rope.kind, rope.theta) == ("linear", 1e4)
