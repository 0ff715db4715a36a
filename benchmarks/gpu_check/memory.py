"""Weights from a file to the device, and a pool that takes what is left of its memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpu_check.context import Context
from gpu_check.driving import Driver, sequence
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine
from kvrelay.engine.device.pool_size import free_host_bytes, num_blocks_that_fit
from kvrelay.engine.device.weights import DevicePacking, RandomWeights
from kvrelay.engine.safetensors_file import read_safetensors, write_safetensors
from kvrelay.protocol.geometry import KVGeometry

SHARE = 0.8


def run(context: Context) -> None:
    """Check and measure both."""
    _load(context)
    if context.device == "gpu":
        _pool(context)


def _load(context: Context) -> None:
    """Load four bfloat16 matrices as one; compare them with what was written."""
    size = 64 if context.tiny else 8192
    names = ("a", "b", "c", "d")
    values = {name: np.full((size, size), index + 0.5, np.float32) for index, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write_safetensors(path, dict.fromkeys(names, (size, size)), "BF16", values.__getitem__)
        tensors = read_safetensors(path)
        packing = DevicePacking(context.framework, "bfloat16")
        packing.upload_stored([tensors["a"]])
        context.synchronize()
        began = time.perf_counter()
        packed = packing.upload_stored([tensors[name] for name in names])
        context.synchronize()
        seconds = time.perf_counter() - began
        found = [float(packed[index * size + size - 1, size - 1]) for index in range(4)]
    assert found == [0.5, 1.5, 2.5, 3.5], found
    assert torch.equal(packed[:size], torch.full_like(packed[:size], 0.5))
    gigabytes = 4 * size * size * 2 / 1e9
    context.report.add("memory", "weights from a cached file to the device", gigabytes / seconds, "GB/s")


def _pool(context: Context) -> None:
    """Size a pool, make the engine, compute its largest step, and see what is left."""
    config = context.config("qwen3-0.6b")
    geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, 16, "bfloat16", "random")
    options = DeviceOptions(context.device, "bfloat16", 16)
    weights = RandomWeights(context.framework, config, "bfloat16").make()
    limits = DeviceEngineLimits(
        num_blocks=0, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=4096, decode_graphs=(1, 8, 64),
        chunk_graphs=(64, 256),
    )  # fmt: skip

    def build(sizes: DeviceEngineLimits) -> DeviceEngine:
        return build_engine(config, weights, geometry, context.framework, sizes, options)

    began = time.perf_counter()
    # The node's memory beside a private pool is only mapped, but no larger than the host's.
    share = min(SHARE, 0.5 * free_host_bytes() / context.framework.memory()[1])
    num_blocks = num_blocks_that_fit(build, context.framework, geometry, limits, share, free_host_bytes)
    probed = time.perf_counter() - began
    engine = build(replace(limits, num_blocks=num_blocks))
    engine.compute_largest_step()
    free, total = context.framework.memory()
    driver = Driver(engine)
    outputs = driver.complete([sequence([3, 1, 4], "one")], 4, 1 << 20)
    engine.close()
    used = 100 * (total - free) / total
    context.report.add("memory", "num_blocks auto: blocks of a Qwen3-0.6B shape", num_blocks)
    context.report.add("memory", "num_blocks auto: memory taken at the end", used, "% of the device", 100 * share)
    context.report.add("memory", "num_blocks auto: finding out", probed, "s")
    assert len(outputs[0]) == 4
    assert 100 * share - 8 <= used <= 100 * share + 2, f"{used:.1f} % of the device's memory is taken, not {share:.2f}"
