"""GEMMs by our own library: of few rows against oneDNN's; of any number, in int8 too, against exact arithmetic."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from engine_runs import Runner, open_engine, sequence, spy_on_sampling, use_kernels

from kvrelay.engine import select_kernels
from kvrelay.engine.int8 import LARGEST, Quantization, quantize_rows, rounded_rows
from kvrelay.engine.native.library import COLUMNS, GemmCall, GemmKind, NativeLibrary
from kvrelay.engine.native_linear import Int8Linear, NativeLinear, OwnLinear, QuantizedRows, SmallBatchGemm
from kvrelay.engine.onednn import ITEM_BYTES, Array, OneDNNLinear, to_bfloat16
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.errors import CheckpointError

SIZES = [(64, 64), (96, 70), (300, 200), (1030, 130)]
ROWS = (1, 2, 5, 6, 7, 12, 13, 30, 97, 200)


def as_float(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float32 else (values.astype(np.uint32) << 16).view(np.float32)


def multiplied(linear: NativeLinear, x: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Return the GEMM of ``x``, float32 or bfloat16 as uint16, added to ``before`` if that is given."""
    dtype = np.uint16 if ITEM_BYTES[linear.out_dtype] == 2 else np.float32
    room = -(-len(x) // 64) * 64
    rows, out = np.zeros((room, x.shape[1]), x.dtype), np.full((room, linear.shape[1]), 7, dtype)
    rows[: len(x)] = x
    if before is not None:
        out[: len(x)] = before
    linear.multiply(rows.ctypes.data, out.ctypes.data, len(x), accumulate=before is not None)
    return out[: len(x)]


def rows_as_quantized(library: NativeLibrary, rows: np.ndarray) -> np.ndarray:
    """Return what the library makes of ``rows``, as float32."""
    count, width = rows.shape
    stride = -(-width // 4) * 4
    values, scales = np.zeros((count, stride), np.uint8), np.zeros(count, np.float32)
    bf16 = rows.dtype == np.uint16
    library.quantize(rows.ctypes.data, bf16, values.ctypes.data, scales.ctypes.data, count, width, stride)
    assert (values[:, width:] == 128).all()
    signed = values[:, :width].astype(np.int16) - 128
    wanted, wanted_scales = quantize_rows(as_float(rows))
    np.testing.assert_allclose(scales, wanted_scales, rtol=1e-6)
    assert np.abs(signed - wanted).max() <= 1
    assert (signed == wanted).mean() > 0.995  # halves may fall to either side
    return signed * scales[:, None]


@pytest.mark.parametrize("quantization", [Quantization.W8A8, Quantization.W8A16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_the_rounded_numbers(
    library: NativeLibrary, quantization: Quantization, dtype: str, size: tuple[int, int]
) -> None:
    size_in, size_out = size
    rng = np.random.default_rng(size_in)
    weight, bias = rng.standard_normal((size_out, size_in), np.float32), rng.standard_normal(size_out, np.float32)
    if (quantization, dtype) == (Quantization.W8A16, "bfloat16") and library.isa != "avx512_bf16":
        assert not library.supports(GemmKind.HALVES_BY_INT8)
        pytest.skip("this CPU has no such GEMMs")
    linear = Int8Linear(library, weight, bias, quantization, dtype, "float32", QuantizedRows(library))
    values = rng.standard_normal((max(ROWS), size_in), np.float32) * rng.exponential(1, (max(ROWS), 1)).astype(
        np.float32
    )
    values[3] = 0
    rows = values if dtype == "float32" else to_bfloat16(values)
    exact = as_float(rows)
    if quantization is Quantization.W8A8:
        exact = rows_as_quantized(library, rows)
    wanted = exact.astype(np.float64) @ rounded_rows(weight).astype(np.float64).T + bias
    whole = multiplied(linear, rows)
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(whole - wanted) <= 1e-5 * scale).all()
    for count in ROWS:
        np.testing.assert_array_equal(multiplied(linear, rows[-count:]), whole[-count:])
    before = rng.standard_normal(whole.shape, np.float32)
    np.testing.assert_array_equal(multiplied(linear, rows, before), before + whole)


@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2])
@pytest.mark.parametrize("size", [*SIZES, (2048, 64)], ids=str)
def test_few_rows_are_the_same_bits_as_in_many(
    library: NativeLibrary, dtype: str, out_dtype: str, size: tuple[int, int]
) -> None:
    onednn = select_kernels.open_onednn()
    if not onednn.supports_dtype(dtype):
        pytest.skip(f"this CPU has no fast {dtype}")
    size_in, size_out = size
    rng = np.random.default_rng(size_in)
    weight, bias = rng.standard_normal((size_out, size_in), np.float32), rng.standard_normal(size_out, np.float32)
    linear = SmallBatchGemm(library).joined(onednn.pack(weight, bias, dtype, out_dtype))
    values = rng.standard_normal((200, size_in), np.float32)
    rows = values if dtype == "float32" else to_bfloat16(values)
    whole = multiplied(linear, rows)
    before = whole[::-1].copy()
    summed = multiplied(linear, rows, before)
    for count in ROWS:
        np.testing.assert_array_equal(multiplied(linear, rows[-count:]), whole[-count:])
        np.testing.assert_array_equal(multiplied(linear, rows[-count:], before[-count:]), summed[-count:])


@pytest.mark.parametrize("holds", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [*SIZES, (37, 65), (2048, 64)], ids=str)
def test_products_that_are_all_our_own_are_right_and_the_same_bits_in_any_number_of_rows(
    library: NativeLibrary, holds: str, size: tuple[int, int]
) -> None:
    size_in, size_out = size
    rng = np.random.default_rng(size_in)
    weight, bias = rng.standard_normal((size_out, size_in), np.float32), rng.standard_normal(size_out, np.float32)
    if holds == "bfloat16":
        weight = as_float(to_bfloat16(weight))
    linear = OwnLinear(library, weight, bias)
    assert linear.size_bytes == _packed_bytes(size, 2 if holds == "bfloat16" and size_in % 2 == 0 else 4)
    rows = rng.standard_normal((200, size_in), np.float32)
    whole = multiplied(linear, rows)
    wanted = rows.astype(np.float64) @ weight.astype(np.float64).T + bias
    assert np.abs(whole - wanted).max() <= 1e-6 * np.sqrt(size_in) * np.abs(wanted).max()
    before = rng.standard_normal(whole.shape, np.float32)
    summed = multiplied(linear, rows, before)
    for count in (*range(1, 30), 48, 96, 97, 200):
        np.testing.assert_array_equal(multiplied(linear, rows[-count:]), whole[-count:])
        np.testing.assert_array_equal(multiplied(linear, rows[-count:], before[-count:]), summed[-count:])


def test_a_weight_in_bfloat16_gives_the_bits_of_the_same_weight_in_float32(library: NativeLibrary) -> None:
    rng = np.random.default_rng(6)
    weight = as_float(to_bfloat16(rng.standard_normal((70, 1500), np.float32)))
    wide = np.vstack([weight, rng.standard_normal((1, 1500), np.float32)])  # the last row keeps all of it in float32
    rows = rng.standard_normal((50, 1500), np.float32)
    narrow, full = OwnLinear(library, weight, None), OwnLinear(library, wide, None)
    assert 2 * narrow.size_bytes == full.size_bytes
    for count in (1, 7, 24, 25, 50):
        np.testing.assert_array_equal(multiplied(narrow, rows[:count]), multiplied(full, rows[:count])[:, :70])


def test_a_row_that_is_not_finite_leaves_the_others_alone(library: NativeLibrary) -> None:
    rng = np.random.default_rng(8)
    linear = OwnLinear(library, as_float(to_bfloat16(rng.standard_normal((64, 64), np.float32))), None)
    rows = rng.standard_normal((40, 64), np.float32)
    clean = multiplied(linear, rows)
    rows[3, 5], rows[30, 63] = np.nan, np.inf
    found = multiplied(linear, rows)
    assert not np.isfinite(found[[3, 30]]).any()
    np.testing.assert_array_equal(np.delete(found, [3, 30], 0), np.delete(clean, [3, 30], 0))


def _packed_bytes(size: tuple[int, int], item_bytes: int) -> int:
    size_in, size_out = size
    return size_in * (-(-size_out // COLUMNS) * COLUMNS) * item_bytes


class StandIn:
    """What oneDNN packs for float32, multiplied here by adding up ``chunk`` elements of a row at a time."""

    dtype = out_dtype = "float32"
    bias = None

    def __init__(self, library: NativeLibrary, weight: np.ndarray, chunk: int, spare_bytes: int = 0) -> None:
        self.num_calls = 0
        size_out, size_in = weight.shape
        self.shape = size_in, size_out
        steps = -(-size_in // 16) * 16
        panels = np.zeros((-(-size_out // COLUMNS) * COLUMNS, steps), np.float32)
        panels[:size_out, :size_in] = weight
        panels = np.ascontiguousarray(panels.reshape(-1, COLUMNS, steps).transpose(0, 2, 1))
        self.array = Array(panels.nbytes + spare_bytes)
        self.array.bytes[: panels.nbytes] = panels.reshape(-1).view(np.uint8)
        self._library = library
        self._call = GemmCall(
            weights=self.array.address,
            size_in=size_in,
            size_out=size_out,
            x_stride=size_in,
            panel_steps=steps,
            slab=chunk,
            kind=GemmKind.FLOATS,
        )

    def multiply(self, x: int, out: int, num_rows: int, accumulate: bool = False) -> None:
        self.num_calls += 1
        call = self._call
        call.x, call.out, call.num_rows, call.accumulate = x, out, num_rows, accumulate
        assert self._library.multiply(ctypes.byref(call))


def test_few_rows_are_our_own_where_they_give_the_same_bits_and_only_there(library: NativeLibrary) -> None:
    rng = np.random.default_rng(4)
    weight, rows = rng.standard_normal((70, 1500), np.float32), rng.standard_normal((64, 1500), np.float32)
    for chunk, spare_bytes, is_ours in ((512, 0, True), (1024, 0, True), (256, 0, False), (512, 64, False)):
        packed = StandIn(library, weight, chunk, spare_bytes)
        linear = SmallBatchGemm(library).joined(cast(OneDNNLinear, packed))
        packed.num_calls = 0
        few, many = multiplied(linear, rows[:48]), multiplied(linear, rows)
        assert packed.num_calls == (1 if is_ours else 2)
        np.testing.assert_array_equal(few, many[:48])
        np.testing.assert_allclose(many, rows @ weight.T, atol=1e-3)


def test_an_odd_number_of_inputs_has_no_pairs(library: NativeLibrary) -> None:
    weight = np.ones((64, 37), np.float32)
    with pytest.raises(CheckpointError, match="takes inputs in pairs, not 37 of them"):
        Int8Linear(library, weight, None, Quantization.W8A16, "bfloat16", "float32", QuantizedRows(library))


def test_the_largest_numbers_do_not_overflow(library: NativeLibrary) -> None:
    signs = np.where(np.random.default_rng(3).random((130, 256)) < 0.5, -1, 1).astype(np.float32)
    weight, rows = signs[:128], np.vstack([signs[:1], np.ones((1, 256), np.float32), -signs[:1]])
    linear = Int8Linear(library, weight, None, Quantization.W8A8, "float32", "float32", QuantizedRows(library))
    np.testing.assert_allclose(multiplied(linear, rows), rows @ weight.T, rtol=1e-5, atol=1e-3)


def test_what_is_not_finite_stays_visible(library: NativeLibrary) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 37), np.float32)
    linear = Int8Linear(library, weight, None, Quantization.W8A8, "float32", "float32", QuantizedRows(library))
    rows = rng.standard_normal((37, 37), np.float32)
    np.fill_diagonal(rows, [np.nan, np.inf, -np.inf] * 12 + [np.nan])
    assert not np.isfinite(multiplied(linear, rows)).any()


def test_rows_are_rounded_to_the_nearest_of_255_numbers() -> None:
    rows = np.array([[1.0, -2.0, 0.5], [0, 0, 0], [1e-30, 0, -1e-30]], np.float32)
    values, scales = quantize_rows(rows)
    assert values.tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, -127]]
    np.testing.assert_allclose(scales, [2 / LARGEST, 0, 1e-30 / LARGEST])
    many = np.random.default_rng(1).standard_normal((50, 333), np.float32)
    allowed = np.abs(many).max(axis=1, keepdims=True) / LARGEST * 0.5001
    assert (np.abs(rounded_rows(many) - many) <= allowed).all()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    write_tiny_checkpoint(path, "qwen2")
    return path


@pytest.mark.parametrize("quantization", ["w8a8", "w8a16"])
def test_logits_change_a_little_and_alike_with_all_kernels(
    model_dir: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, np.ndarray] = {}

    def keep(name: str, logits: np.ndarray | None, batch: object) -> None:
        assert logits is not None
        found[name] = logits.copy()

    for name, kernels, kind in (
        ("exact", "portable", "none"),
        ("portable", "portable", quantization),
        ("gemm", "gemm", quantization),
        ("native", "native", quantization),
    ):
        with monkeypatch.context() as patch:
            asked = use_kernels(kernels, patch)
            spy_on_sampling(patch, partial(keep, name))
            engine = open_engine(model_dir, engine={"kernels": asked, "quantization": kind})
            Runner(engine).finish(sequence(np.random.default_rng(5).integers(0, 384, 90).tolist(), max_tokens=1))
            engine.close()
    scale = np.abs(found["exact"]).max()
    for name in ("portable", "gemm", "native"):
        assert 1e-5 < np.abs(found[name] - found["exact"]).max() / scale < 0.1
    # what a last bit turns to another side of a rounding is one step of 127 further on
    near = 0.05 if quantization == "w8a8" else 1e-4
    for name in ("gemm", "native"):
        assert np.abs(found[name] - found["portable"]).max() / scale < near


def test_kv_of_quantized_weights_is_of_another_model(model_dir: Path) -> None:
    digests = set()
    for kind in ("none", "w8a8", "w8a16"):
        engine = open_engine(model_dir, engine={"kernels": "portable", "quantization": kind})
        digests.add(engine.geometry.model_digest)
        engine.close()
    assert len(digests) == 3
