"""Golden tokens of transformers in float32: one by one and together, by graphs and without, with digests of the KV."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from golden.cases import CASES, GoldenCase, load_golden

from gpu_check.context import Context
from gpu_check.driving import PLAIN, Driver, Mode, sequence
from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder import load_weights
from kvrelay.engine.decoder_config import read_decoder_config
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.load import DeviceOptions, build_engine, quantizer
from kvrelay.engine.device.weights import DevicePacking
from kvrelay.protocol.geometry import KVGeometry

MAX_MODEL_LEN = 2048


def run(context: Context) -> None:
    """Check every case; AssertionError names those that differ, after all have been tried."""
    wrong: list[str] = []
    every = [(graphs, digests) for graphs in (True, False) for digests in (True, False)]
    for case in CASES[:1] if context.tiny else CASES:
        for graphs, digests in every if case is CASES[0] and not context.tiny else [(True, True)]:
            check_case(context, case, graphs, digests, wrong)
    right = _leading_tokens(context, CASES[0], "bfloat16")
    context.report.add("golden", f"{CASES[0].name} in bfloat16: output tokens before the first that differs", right)
    _check_gathered(context, CASES[0], wrong)
    assert not wrong, wrong


def _check_gathered(context: Context, case: GoldenCase, wrong: list[str]) -> None:
    """Compare keys and values of a prompt computed at once, over its gathered context, with those of its chunks."""
    engine = engine_of_case(context, case, "bfloat16", True, False)
    tokens = np.random.default_rng(0).integers(0, engine.vocab_size, 40 if context.tiny else 1200).tolist()
    driver, kv = Driver(engine), []
    for chunk in (1 << 20, 97):
        one = sequence(tokens, f"in chunks of {chunk}")
        driver.complete([one], 1, chunk)
        position, size = np.arange(len(tokens)), engine.geometry.block_size
        slots = np.array(one.block_table)[position // size] * size + position % size
        index = torch.from_numpy(slots).to(context.torch_device)
        kv.append(torch.stack([side[index].float() for layer in engine.launcher.pool.layers for side in layer]))
    engine.close()
    distance, most = float((kv[0] - kv[1]).norm() / kv[1].norm()), 0.03
    name = f"{case.name} in bfloat16, keys and values of {len(tokens)} tokens at once and in chunks"
    context.report.add("golden", name, distance, "relative distance", most)
    if not distance <= most:  # never for NaN
        wrong.append(name)


def check_case(
    context: Context, case: GoldenCase, graphs: bool, digests: bool, wrong: list[str], mode: Mode = PLAIN
) -> None:
    """Compare the tokens of ``case`` in float32."""
    engine = engine_of_case(context, case, "float32", graphs, digests, mode)
    goldens = [golden for golden in load_golden(case) if not context.tiny or len(golden.prompt_token_ids) < 20]
    expected = [golden.output_token_ids for golden in goldens]
    count = len(expected[0])
    driver = Driver(engine)
    results: dict[str, int] = {}
    ways = (("together", 97, False), ("together whole", 1 << 20, False), ("two steps in flight", 97, True))
    for how, chunk, ahead in ways:
        together = [sequence(golden.prompt_token_ids, f"{how} {index}") for index, golden in enumerate(goldens)]
        outputs = (driver.complete_ahead if ahead else driver.complete)(together, count, chunk)
        results[how] = sum(ours == theirs for ours, theirs in zip(outputs, expected, strict=True))
        driver.give_back(together)
    alone = []
    for index, golden in enumerate(goldens):
        one = sequence(golden.prompt_token_ids, f"alone {index}")
        alone += driver.complete([one], count, 1 << 20)
        driver.give_back([one])
    results["alone"] = sum(ours == theirs for ours, theirs in zip(alone, expected, strict=True))
    engine.close()
    name = f"{case.name}, graphs {graphs}, digests {digests}{mode.suffix}"
    context.report.add("golden", name, " ".join(f"{how}: {right}/{len(goldens)}" for how, right in results.items()))
    if any(right != len(goldens) for right in results.values()):
        wrong.append(name)


def _leading_tokens(context: Context, case: GoldenCase, dtype: str) -> str:
    engine = engine_of_case(context, case, dtype, True, False)
    goldens = [golden for golden in load_golden(case) if not context.tiny or len(golden.prompt_token_ids) < 20]
    made = [sequence(golden.prompt_token_ids, str(index)) for index, golden in enumerate(goldens)]
    outputs = Driver(engine).complete(made, len(goldens[0].output_token_ids), 1 << 20)
    engine.close()
    leading = [
        next(
            (index for index, pair in enumerate(zip(ours, golden.output_token_ids, strict=True)) if len({*pair}) > 1),
            64,
        )
        for ours, golden in zip(outputs, goldens, strict=True)
    ]
    return " ".join(map(str, leading))


def engine_of_case(
    context: Context, case: GoldenCase, dtype: str, graphs: bool, digests: bool, mode: Mode = PLAIN
) -> DeviceEngine:
    """Return an engine of a golden case's weights."""
    interpreted = context.interpreted and dtype != "bfloat16"  # which Triton's interpreter does not multiply
    how = DeviceOptions(context.device, dtype, 16, interpreted, *mode)
    with tempfile.TemporaryDirectory() as folder:
        case.write_checkpoint(Path(folder), tokenizer=False)
        config = read_decoder_config(Path(folder))
        checkpoint = Checkpoint.open(Path(folder), config, lambda done, total: None)
        weights = load_weights(
            checkpoint, DevicePacking(context.framework, dtype, quantizer(context.framework, config, how))
        )
        geometry = KVGeometry(
            config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype, checkpoint.digest(case.name)
        )
    max_model_len = case.max_model_len or MAX_MODEL_LEN
    limits = DeviceEngineLimits(
        num_blocks=512, max_model_len=max_model_len, max_num_seqs=8, max_num_batched_tokens=4096,
        decode_graphs=(1, 4, 8) if graphs else (), chunk_graphs=(64, 256) if graphs else (), device_pool=True,
        digests=digests,
    )  # fmt: skip
    return build_engine(config, weights, geometry, context.framework, limits, how)
