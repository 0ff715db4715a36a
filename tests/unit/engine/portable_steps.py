"""Steps that lead the portable kernels through every Paddle operator they use, for tests; also a program.

As a program (``python portable_steps.py DIRECTORY``) it prints the tokens, so that it can run on an emulated CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
from support.ids import block_ids

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.engine import kv_pool, portable
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.engine.tiny import write_tiny_checkpoint
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.ids import RequestId
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence

LONG, SHORT, CHUNK, NUM_OUTPUTS = 40, 5, 24, 3


def steps_of_all_kinds(directory: Path) -> list[list[int]]:
    """Return the tokens of two sequences on one engine after the other: plain, quantized, with a staged pool.

    The model has norms of heads, biases and two windows. Prompts come in chunks and together; one is there already.
    """
    windows = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}
    overrides = {**windows, "attention_bias": True, "num_hidden_layers": 2}
    write_tiny_checkpoint(directory, "qwen3", overrides=overrides)
    tokens = _tokens(directory, "none") + _tokens(directory, "w8a8")
    with patch.object(portable, "MappedPool", kv_pool.StagedPool):
        return tokens + _tokens(directory, "none")


def _tokens(directory: Path, quantization: str) -> list[list[int]]:
    node = {"name": "m0", "role": "mixed", "port": 8200, "threads": 1}
    data = {
        "model": {"path": str(directory)},
        "cache": {"num_blocks": 16},
        "engine": {"kernels": "portable", "quantization": quantization},
        "nodes": [node],
    }
    engine = load_engine(ClusterConfig.from_data(data).node("m0"), lambda done, total: None)
    try:
        return _generated(engine)
    finally:
        engine.close()


def _generated(engine: Engine) -> list[list[int]]:
    plans = PlanWriter()
    long, short, again = _sequence(LONG, 0), _sequence(SHORT, 4), _sequence(LONG, 8)
    _step(engine, plans, (long, CHUNK))
    _step(engine, plans, (long, LONG - CHUNK), (short, SHORT))
    for _ in range(NUM_OUTPUTS - 1):
        _step(engine, plans, (long, 1), (short, 1))
    assert isinstance(engine.memory, KVMemory)
    planes = engine.memory.planes
    planes[:, :, again.block_table] = planes[:, :, long.block_table]
    again.num_computed_tokens = LONG
    engine.run(plans.write(1, [again], [Chunk(LONG - 1, 1, True)]), lambda layers: None)
    return [one.token_ids[one.num_prompt_tokens :] for one in (long, short)]


def _sequence(num_tokens: int, first_block: int) -> Sequence:
    sampling = SamplingParams(max_tokens=NUM_OUTPUTS, seed=0, temperature=0.0, ignore_eos=True)
    prompt = np.random.default_rng(num_tokens).integers(3, 384, num_tokens).tolist()
    one = Sequence(
        RequestSpec(request_id=RequestId(f"r{first_block}"), epoch=0, prompt_token_ids=prompt, sampling=sampling)
    )
    one.take_blocks(block_ids(*range(first_block, first_block + 4)))
    return one


def _step(engine: Engine, plans: PlanWriter, *batch: tuple[Sequence, int]) -> None:
    sequences = [one for one, _ in batch]
    chunks = [
        Chunk(one.num_computed_tokens, count, one.num_computed_tokens + count == one.num_tokens) for one, count in batch
    ]
    result = engine.run(plans.write(1, sequences, chunks), lambda layers: None)
    for one, chunk, sampled in zip(sequences, chunks, result.sampled, strict=True):
        one.num_computed_tokens += chunk.num_tokens
        one.token_ids += sampled.token_ids


if __name__ == "__main__":
    print(json.dumps(steps_of_all_kinds(Path(sys.argv[1]))))
