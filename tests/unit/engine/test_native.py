"""What native kernels promise beyond being right: the same bits in any batch, and a known error in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import Runner, not_compiled, open_engine, output, planes_of, sequence, spy_on_sampling, use_kernels
from support.ids import block_ids

from kvrelay.engine import select_kernels
from kvrelay.engine.interface import Engine
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.errors import CheckpointError, ConfigError
from kvrelay.protocol.request import Sequence

LENGTHS = (1, 15, 33, 64, 200, 300)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 with norms of heads, biases and windows shorter and longer than a segment of context."""
    path = tmp_path_factory.mktemp("native")
    overrides = {"use_sliding_window": True, "sliding_window": 150, "max_window_layers": 2, "attention_bias": True}
    write_tiny_checkpoint(path, "qwen3", dtype="bfloat16", overrides=overrides)
    return path


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels("native", monkeypatch)


def skip_unless_fast(dtype: str) -> None:
    if not select_kernels.open_onednn().supports_dtype(dtype):
        pytest.skip(f"this CPU has no fast {dtype}")


Opener = Callable[[], Engine]


@pytest.fixture(params=["float32", "float32-w8a8", "float32-w8a16", "bfloat16", "bfloat16-w8a8", "bfloat16-w8a16"])
def open_native(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Opener]:
    """Opens engines in one type, perhaps with weights in int8."""
    dtype, _, quantization = request.param.partition("-")
    if dtype == "bfloat16":
        skip_unless_fast(dtype)
    opened: list[Engine] = []

    def open_one() -> Engine:
        settings = {"kernels": "native", "quantization": quantization or "none"}
        opened.append(open_engine(model_dir, model={"dtype": dtype}, engine=settings))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


@pytest.fixture
def native(open_native: Opener) -> Engine:
    return open_native()


class Logits:
    """The logits each sequence's tokens were sampled from, by request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}
        spy_on_sampling(monkeypatch, self._see)

    def _see(self, logits: np.ndarray | None, batch: Any) -> None:
        sampling = [item for item in batch if item.samples]
        for row, item in zip(() if logits is None else logits, sampling, strict=True):
            self.rows.setdefault(item.sequence.request_id, []).append(row.copy())

    def take(self) -> dict[str, np.ndarray]:
        taken = {name: np.stack(rows) for name, rows in self.rows.items()}
        self.rows = {}
        return taken


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Logits:
    return Logits(monkeypatch)


def asked() -> list[Sequence]:
    rng = np.random.default_rng(7)
    return [sequence(rng.integers(0, 384, n).tolist(), f"r{n}", max_tokens=5) for n in LENGTHS]


def test_logits_are_the_same_bits_alone_and_in_any_batch_or_chunks(native: Engine, logits: Logits) -> None:
    for one in asked():
        Runner(native).finish(one)
    alone = logits.take()
    for chunk in (16, 77, 1000):
        Runner(native, seed=chunk).finish(*asked(), chunk=chunk)
        together = logits.take()
        for name, wanted in alone.items():
            np.testing.assert_array_equal(together[name], wanted)


def test_kv_moved_to_another_engine_gives_the_same_bits(open_native: Opener, logits: Logits) -> None:
    native, other = open_native(), open_native()
    Runner(native).finish(asked()[-1])
    wanted = logits.take()["r300"]
    one = asked()[-1]
    Runner(native, seed=1).run((one, 256))
    there = list(one.block_table)
    one.take_blocks(block_ids(*range(40, 40 + len(there))))
    planes_of(other)[:, :, one.block_table] = planes_of(native)[:, :, there]
    Runner(other, seed=2).finish(one)
    np.testing.assert_array_equal(logits.take()["r300"], wanted)


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    opened = select_kernels.open_library()
    yield opened
    opened.limit_isa(4)


@pytest.mark.parametrize("level", range(4), ids=["baseline", "avx2", "avx512", "avx512_vnni"])
def test_lesser_cpus_compute_the_same_but_for_rounding(
    open_native: Opener, logits: Logits, library: NativeLibrary, level: int, request: pytest.FixtureRequest
) -> None:
    native = open_native()
    allowed = 1e-5 if native.geometry.dtype == "float32" else 0.03
    if "w8a8" in request.node.callspec.id:
        allowed = 0.1  # a last bit may turn a rounded row by one step of 127
    Runner(native).finish(*(sequence(one.token_ids, one.spec.request_id, max_tokens=1) for one in asked()))
    best, isa = logits.take(), library.isa
    library.limit_isa(level)
    if library.isa == isa:
        pytest.skip(f"this CPU has nothing above {isa}")
    try:
        lesser = open_native()
    except ConfigError as error:
        assert "bfloat16-w8a16" in request.node.callspec.id
        pytest.skip(str(error))
    for chunk in (1000, 60):
        batch = [sequence(one.token_ids, one.spec.request_id, max_tokens=1) for one in asked()]
        Runner(lesser, seed=chunk).finish(*batch, chunk=chunk)
        found = logits.take()
        for name, wanted in best.items():
            assert np.abs(found[name] - wanted).max() < allowed * np.abs(wanted).max()
        if chunk == 1000:
            whole = found
    for name, wanted in whole.items():
        np.testing.assert_array_equal(found[name], wanted)


def test_threads_do_not_change_a_bit(model_dir: Path, logits: Logits) -> None:
    if not select_kernels.open_library().owns_floats:
        skip_unless_fast("float32")  # where oneDNN has no blocked GEMMs, it divides long sums among its threads
    found = []
    for threads in (1, 2, 3):
        nodes = [{"name": "m0", "role": "mixed", "port": 8200, "threads": threads}]
        engine = open_engine(model_dir, nodes=nodes, model={"dtype": "float32"}, engine={"kernels": "native"})
        Runner(engine).finish(*asked())
        engine.close()
        found.append(logits.take())
    for other in found[1:]:
        for name, wanted in found[0].items():
            np.testing.assert_array_equal(other[name], wanted)


def test_on_avx2_a_bfloat16_checkpoint_gives_the_tokens_of_float32_and_the_same_bits_however_it_is_computed(
    model_dir: Path, logits: Logits, library: NativeLibrary
) -> None:
    library.limit_isa(1)
    if not library.owns_floats:
        pytest.skip("this CPU has no AVX2")
    found: list[dict[str, np.ndarray]] = []
    for kernels, threads, chunk in (("portable", 1, 1000), ("native", 1, 1000), ("native", 3, 1000), ("native", 2, 20)):
        nodes = [{"name": "m0", "role": "mixed", "port": 8200, "threads": threads}]
        engine = open_engine(model_dir, nodes=nodes, model={"dtype": "float32"}, engine={"kernels": kernels})
        Runner(engine, seed=chunk).finish(*asked(), chunk=chunk)
        engine.close()
        found.append(logits.take())
    portable, native, *others = found
    for name, wanted in native.items():
        np.testing.assert_array_equal(wanted.argmax(axis=1), portable[name].argmax(axis=1))
        np.testing.assert_allclose(wanted, portable[name], rtol=0, atol=1e-5 * np.abs(wanted).max())
        for other in others:
            np.testing.assert_array_equal(other[name], wanted)


def test_bfloat16_is_what_a_bfloat16_checkpoint_gets_and_its_logits_are_near_those_of_float32(
    model_dir: Path, logits: Logits
) -> None:
    skip_unless_fast("bfloat16")
    found = {}
    for dtype in ("float32", "auto"):
        engine = open_engine(model_dir, model={"dtype": dtype})
        Runner(engine).finish(*(sequence(one.token_ids, one.spec.request_id, max_tokens=1) for one in asked()))
        found[engine.geometry.dtype] = logits.take()
        engine.close()
    for name, exact in found["float32"].items():
        error = np.abs(found["bfloat16"][name] - exact).max() / np.abs(exact).max()
        assert 0 < error < 0.05


def test_a_float32_checkpoint_is_computed_in_float32(tiny_dir: Path, kernels: str) -> None:
    engine = open_engine(tiny_dir, engine={"kernels": kernels})
    assert engine.geometry.dtype == "float32"
    engine.close()


def test_portable_and_native_kernels_share_kv(tiny_dir: Path) -> None:
    ours, theirs = (open_engine(tiny_dir, engine={"kernels": name}) for name in ("native", "portable"))
    assert ours.geometry == theirs.geometry
    prompt = np.random.default_rng(3).integers(0, 384, 40).tolist()
    one, other = sequence(prompt, max_tokens=8), sequence(prompt, max_tokens=8)
    Runner(ours).finish(one)
    runner = Runner(theirs)
    runner.run((other, 40))
    planes_of(ours)[:, :, other.block_table] = planes_of(theirs)[:, :, other.block_table]
    runner.engine = ours
    runner.finish(other)
    assert output(other) == output(one)
    ours.close()
    theirs.close()


def test_native_kernels_that_are_not_there_are_an_error_that_says_so(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_kernels, "open_library", not_compiled)
    with pytest.raises(ConfigError, match=r"engine.kernels: .*not compiled when kvrelay was installed"):
        open_engine(tiny_dir, engine={"kernels": "native"})


def test_auto_takes_what_there_is_and_says_why(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        open_engine(tiny_dir, engine={"kernels": "portable"}).close()
        open_engine(tiny_dir).close()
        monkeypatch.setattr(select_kernels, "open_library", not_compiled)
        open_engine(tiny_dir).close()
        monkeypatch.setattr(select_kernels, "open_onednn", not_compiled)
        open_engine(tiny_dir).close()
    lines = [record.message for record in caplog.records if record.message.startswith("kernels: ")]
    asked, native, gemm, portable = lines
    assert asked == "kernels: portable in float32 (as engine.kernels says)"
    assert native.startswith("kernels: native in float32 (oneDNN 3.")
    assert "for GEMMs in float32, portable for all else in float32 (the native kernels were not" in gemm
    assert portable.startswith("kernels: portable in float32 (the native kernels were not compiled")


def test_products_in_bfloat16_are_near_those_in_float32(
    model_dir: Path, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_fast("bfloat16")
    monkeypatch.setattr(select_kernels, "open_library", not_compiled)
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = open_engine(model_dir, model={"dtype": dtype})
        assert engine.geometry.dtype == "float32"
        Runner(engine).finish(sequence(asked()[-1].token_ids, max_tokens=1))
        engine.close()
        found.append(logits.take()["r"])
    assert 0 < np.abs(found[0] - found[1]).max() / np.abs(found[0]).max() < 0.05


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"dtype": "float16"}}, "computes in bfloat16 or float32"),
        ({"cache": {"dtype": "float16"}}, "the KV cache is of the type of compute"),
    ],
)
def test_a_type_the_native_kernels_do_not_have_is_refused(
    tiny_dir: Path, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_engine(tiny_dir, **sections)
