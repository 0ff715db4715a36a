"""The device engine on Paddle, and what only a GPU does there with doubles for Paddle's GPU build and the driver."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from engine_runs import Runner, open_engine, outcomes_in_order, run_batch, sequence
from support.token_rules import strict_rules

from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.paddle_framework import PaddleFramework
from kvrelay.engine.device.step_slot import UploadArena
from kvrelay.errors import ConfigError, DeviceError, EngineError
from kvrelay.node.plans import Chunk
from kvrelay.protocol.messages.engine import SequenceFailed
from kvrelay.protocol.request import Grammar, GrammarKind, Sequence

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 30},
    {"repetition_penalty": 1.3, "num_logprobs": 3},
    {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}, "min_tokens": 4, "eos_token_ids": [7]},
    {"temperature": 1.2, "min_p": 0.02, "num_logprobs": 0},
    {"temperature": 1.0, "token_rules": strict_rules(384)},
    {"temperature": 1.0, "num_logprobs": 1, "grammar": Grammar(GrammarKind.REGEX, "([a-m][n-z]){50}")},
]


def sequences() -> list[Sequence]:
    return [
        sequence(
            np.random.default_rng(index).integers(0, 384, 3 + 9 * index).tolist(), f"r{index}", max_tokens=6,
            seed=index, **KINDS[index],
        )
        for index in range(len(KINDS))
    ]  # fmt: skip


def engine_of(path: Path, kind: str, **sections: Any) -> DeviceEngine:
    engine = open_engine(path, engine={"kind": kind}, scheduler={"max_num_seqs": 8}, **sections)
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.mark.parametrize("link", ["auto", "cuda"])
@pytest.mark.parametrize("chunk", [11, 1 << 20])
def test_tokens_and_log_probabilities_are_those_of_torch(link: str, chunk: int, tiny_dir: Path) -> None:
    """Decode steps are graphs; with ``cuda`` the pool is a simulated device's."""
    results = []
    for kind in ("torch", "paddle-device"):
        engine = engine_of(tiny_dir, kind, transfer={"link": link})
        results.append(Runner(engine).finish(*sequences(), chunk=chunk))
        engine.close()
    theirs, ours = results
    assert [[entry.token_ids for entry in one] for one in ours] == [
        [entry.token_ids for entry in one] for one in theirs
    ]
    for mine, reference in zip(ours[2], theirs[2], strict=True):
        assert mine.logprobs[0].top_token_ids == reference.logprobs[0].top_token_ids
        np.testing.assert_allclose(mine.logprobs[0].logprob, reference.logprobs[0].logprob, atol=1e-4)


def test_a_step_that_is_not_finite_fails_its_sequence(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_dir, "paddle-device")
    sample = engine.launcher.decoder.sample

    def with_nan(logits: Any, step: Any) -> Any:
        logits[1, 3] = float("nan")
        return sample(logits, step)

    monkeypatch.setattr(engine.launcher.decoder, "sample", with_nan)
    runner, items = Runner(engine), []
    for one in sequences()[:2]:
        runner.give_blocks(one, one.num_tokens)
        items.append((one, Chunk(0, one.num_tokens, True)))
    _, failed = outcomes_in_order(run_batch(engine, *items))
    assert failed == SequenceFailed("the model's logits are not finite at output position 0")
    monkeypatch.undo()
    engine.close()


def test_types_of_16_bits_are_for_gpus(tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype bfloat16: on a CPU Paddle computes float32 only"):
        engine_of(tiny_dir, "paddle-device", model={"dtype": "bfloat16"})


def test_a_paddle_without_gpu_says_so(tiny_dir: Path) -> None:
    with pytest.raises(EngineError, match="this Paddle finds no CUDA device"):
        open_engine(tiny_dir, engine={"kind": "paddle-device", "device": "gpu"})


# ------------------------------------------------------------ what only a GPU does


class Driver:
    """Events of the CUDA driver: numbers, passed when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.passed = False

    def create_event(self) -> int:
        return 7

    def has_passed(self, event: int) -> bool:
        return self.passed

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


class Cuda:
    """A PaddleCuda without CUDA."""

    errors = (RuntimeError, OSError)

    def __init__(self) -> None:
        self.streams: list[Any] = []

    def own_stream(self) -> str:
        return "paddle's"

    def event(self) -> str:
        return "an event"

    def on(self, stream: Any) -> Any:
        self.streams.append(stream)
        return contextlib.nullcontext()

    def pinned_tensor(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, str]:
        return np.full(shape, -1, dtype), "its tensor"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PaddleFramework:
    framework = PaddleFramework("cpu")
    framework.is_gpu, framework._cuda = True, Cuda()  # type: ignore[assignment]
    return framework


def test_the_engine_works_in_the_stream_of_paddles_gemms(gpu: PaddleFramework) -> None:
    stream: Any = gpu.stream()
    assert stream == "paddle's"
    with gpu.on(stream):
        pass
    assert gpu._cuda.streams == ["paddle's"]  # type: ignore[union-attr]
    array, tensor = gpu.staging(5)
    assert array.tolist() == [0] * 5
    assert tensor == "its tensor"


def test_graphs_share_a_pool_and_end_their_capture_if_it_breaks(
    gpu: PaddleFramework, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrelay.engine.paddle_runtime import paddle

    calls: list[Any] = []

    class CUDAGraph:
        def __init__(self, place: Any, pool_id: int) -> None:
            calls.append(pool_id)

        def capture_begin(self) -> None:
            calls.append("begin")

        def capture_end(self) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(paddle.device.cuda.graphs, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(paddle.device, "synchronize", lambda place: calls.append("synchronize"))
    gpu._graph_pool = 3
    graph = gpu.capture(lambda: "output", gpu.stream())
    graph.replay()
    assert graph.output == "output"
    assert calls == [3, "synchronize", "begin", "end", "replay"]
    with pytest.raises(ZeroDivisionError):
        gpu.capture(lambda: 1 // 0, gpu.stream())
    assert calls[5:] == [3, "synchronize", "begin", "end"]


def test_a_device_that_is_lost_is_told(gpu: PaddleFramework, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvrelay.engine.paddle_runtime import paddle

    def broken(place: Any) -> None:
        raise OSError("(External) CUDA error(700), an illegal memory access was encountered.")

    monkeypatch.setattr(paddle.device, "synchronize", broken)
    with pytest.raises(DeviceError, match=r"error\(700\)"):
        gpu.synchronize()


def test_events_are_the_drivers_and_streams_wait_for_them() -> None:
    code = """
import numpy as np
from types import SimpleNamespace
from kvrelay.kv_pool import paddle_cuda
from test_paddle_framework import Driver
driver = Driver()
stream = paddle_cuda.PaddleStream(SimpleNamespace(stream_base=SimpleNamespace(raw_stream=99)), driver)
event = paddle_cuda.DriverEvent(driver)
event.record(stream)
stream.wait_event(event)
assert not event.query()
event.synchronize()
assert driver.calls == [("record_event", 7, 99), ("queue_wait", 99, 7), ("wait_for_event", 7)], driver.calls
"""
    run_alone(code)


def test_pinned_memory_is_that_of_its_tensor_and_outlives_its_name() -> None:
    code = """
import gc
import numpy as np
from kvrelay.kv_pool import paddle_cuda
empty = paddle_cuda.paddle.empty
paddle_cuda.paddle.empty = lambda shape, dtype, device, pin_memory: empty(shape, dtype) if pin_memory else None
cuda = paddle_cuda.PaddleCuda.__new__(paddle_cuda.PaddleCuda)
cuda.place = None
array, tensor = cuda.pinned_tensor((2, 3), np.int32)
array[:] = [[1, 2, 3], [4, 5, 6]]
assert tensor.tolist() == array.tolist() and array.ctypes.data == tensor.data_ptr()
view = array[1]
del array, tensor
gc.collect()
empty([6], "int32")[:] = 0
assert view.tolist() == [4, 5, 6]
"""
    run_alone(code)


def test_triton_finds_in_paddle_what_it_asks_of_torch() -> None:
    pytest.importorskip("triton", reason="kvrelay[torch] brings triton on Linux x86_64 only")
    code = """
import sys
import weakref
from kvrelay.kv_pool import paddle_cuda
paddle_cuda._let_triton_in()
from triton.backends.driver import GPUDriver
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

class Driver(GPUDriver):
    is_active = map_python_to_cpp_type = get_current_target = get_active_torch_device = get_benchmarker = None

Driver.__abstractmethods__ = frozenset()
driver, paddle = Driver(), paddle_cuda.paddle
assert driver.get_current_stream is paddle.base.libpaddle._get_current_raw_stream
assert driver.get_current_device is paddle.cuda.current_device
assert driver.get_device_capability is paddle.cuda.get_device_capability
assert driver.set_current_device is paddle.cuda.set_device
names = [mangle_type(paddle.zeros([4], dtype)) for dtype in ("float16", "bfloat16", "float32", "float64", "int32")]
assert names == ["*fp16", "*bf16", "*fp32", "*fp64", "*i32"], names
TensorDescriptor(paddle.zeros([64, 16], "float16"), [64, 16], [16, 1], [16, 16])
assert sys.modules["torch"].__file__ == paddle.__file__
"""
    run_alone(code)


def test_importing_paddle_leaves_signals_as_the_messager_has_them() -> None:
    """Only the node ends a messager."""
    code = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import kvrelay.kv_pool.paddle_cuda
os.kill(os.getpid(), signal.SIGTERM)
"""
    run_alone(code)


def run_alone(code: str) -> None:
    """Run ``code`` in a process of its own: modules imported with the proxy stay as they are."""
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", path + code], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_outgrown_staging_memory_lives_until_the_device_has_read_it() -> None:
    """Paddle gives pinned memory to the next who asks, whatever is still copied from it."""
    made: list[weakref.ref[np.ndarray]] = []

    class Framework:
        def staging(self, num_words: int) -> tuple[np.ndarray, np.ndarray]:
            tensor = np.zeros(num_words, np.int32)
            made.append(weakref.ref(tensor))
            return np.zeros(num_words, np.int32), tensor

    arena = UploadArena(cast(Any, Framework()), 8)
    arena.take(4)
    arena.take(100)
    assert made[0]() is not None
    arena.clear()
    assert [one() is None for one in made] == [True, False]
