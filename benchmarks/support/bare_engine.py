"""The engine of a node without the node: steps over sequences with preallocated blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import yaml

from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.engine.interface import Engine
from kvrelay.engine.load import load_engine
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.ids import BlockId, RequestId
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence

BLOCK_SIZE = 16

Batch: TypeAlias = list[tuple[Sequence, Chunk]]


class BareEngine:
    """Runs steps. Sequences made by it share nothing."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._plans = PlanWriter()
        self._step = 0

    def sequence(
        self, tokens: list[int], block_table: list[BlockId], max_tokens: int = 1, num_logprobs: int | None = None
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, num_logprobs=num_logprobs)
        sequence = Sequence(RequestSpec(request_id=RequestId("r"), epoch=1, prompt_token_ids=tokens, sampling=sampling))
        sequence.take_blocks(block_table)
        return sequence

    def run(self, batch: Batch) -> list[SampledTokens]:
        """Compute a chunk of each sequence. The sequences stay as they are."""
        self._step += 1
        plan = self._plans.write(self._step, [one for one, _ in batch], [chunk for _, chunk in batch])
        return self.engine.run(plan, lambda layers: None).sampled

    def advance(self, sequences: Seq[Sequence]) -> list[SampledTokens]:
        """Compute all tokens of ``sequences`` that are not computed yet; return what is sampled then.

        Sequences with one such token do it in one step; of others each has a step of its own.
        """
        scheduled = [
            (one, Chunk(one.num_computed_tokens, one.num_tokens - one.num_computed_tokens, True)) for one in sequences
        ]
        decodes = all(chunk.num_tokens == 1 for _, chunk in scheduled)
        sampled = self.run(scheduled) if decodes else [self.run([item])[0] for item in scheduled]
        for one in sequences:
            one.num_computed_tokens = one.num_tokens
            self._plans.leave(one)  # the caller may append other tokens than were sampled
        return sampled


@contextmanager
def bare_engine(
    model: Path, num_blocks: int, max_model_len: int, threads: int, overrides: Seq[str] = ()
) -> Iterator[BareEngine]:
    """Load ``model`` as a mixed node with these ``overrides`` (``a.b=c``) would; close the engine at the end."""
    config = {
        "model": {"path": str(model), "max_model_len": max_model_len},
        "cache": {"block_size": BLOCK_SIZE, "num_blocks": num_blocks},
        "nodes": [{"name": "m0", "role": "mixed", "port": 8200, "threads": threads}],
    }
    with tempfile.TemporaryDirectory(prefix="kvb-") as name:
        path = Path(name) / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        node = ClusterConfig.load(path, list(overrides)).node("m0")
    engine = load_engine(node, lambda done, total: None)
    try:
        yield BareEngine(engine)
    finally:
        engine.close()
