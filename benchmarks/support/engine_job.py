"""Runs our engine on prompts from standard input: see ``prompt_jobs``.

Usage: python engine_job.py MODEL QUANTIZATION THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from support.bare_engine import BLOCK_SIZE, bare_engine
from support.prompt_jobs import answer_prompts

from kvrelay.protocol.ids import BlockId

MAX_MODEL_LEN = 2048


def main() -> None:
    model, quantization, threads = sys.argv[1:]
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE
    overrides = [f"engine.quantization={quantization}"]
    with bare_engine(Path(model), num_blocks, MAX_MODEL_LEN, int(threads), overrides) as engine:

        def generate(prompt: list[int], num_tokens: int) -> Iterator[int]:
            sequence = engine.sequence(prompt, list(map(BlockId, range(num_blocks))), max_tokens=num_tokens)
            for _ in range(num_tokens):
                [sampled] = engine.advance([sequence])
                sequence.token_ids += sampled.token_ids
                yield sampled.token_ids[0]

        answer_prompts(generate, int(threads))


if __name__ == "__main__":
    main()
