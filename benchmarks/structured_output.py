"""Cost of structured output on a node: masks, and sampling with them, at a vocabulary of 150,000 tokens.

Each sequence samples JSON for a schema, greedily from random logits. Masks are computed in a thread while the forward
pass runs, so a step takes longer by ``added`` only, or by both together where the forward pass takes no time. Sampling
is measured in CPU time, masks in wall time, because the library has threads of its own. The vocabulary is made of
random words.

Usage: python benchmarks/structured_output.py [--batch-sizes 1 8 32] [--steps 60] [--vocab-size 151936]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import time
from concurrent.futures import Future

import numpy as np
from rich.console import Console
from rich.table import Table

from kvrelay.engine.sampler import sample
from kvrelay.engine.sequences import EngineSequence
from kvrelay.grammar.constraint import GrammarConstraint, Wanted
from kvrelay.grammar.mask_writer import MaskWriter
from kvrelay.grammar.vocabulary import Vocabulary
from kvrelay.protocol.ids import RequestId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence
from kvrelay.protocol.request import Grammar, GrammarKind, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 200},
        "kind": {"enum": ["red", "green", "blue"]},
        "size": {"type": "number", "minimum": 0, "maximum": 1000},
        "parts": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "integer"}}}},
    },
    "required": ["name", "kind", "size", "parts"],
    "additionalProperties": False,
}
EOS = 0


def words(count: int) -> list[bytes]:
    """Return all bytes and random words, as a byte-level vocabulary has them."""
    rng = random.Random(0)
    found = {bytes([byte]): None for byte in range(256)}
    letters = string.ascii_letters * 3 + string.digits + '":,{}[]_.-'
    while len(found) < count:
        begin = rng.choice(["", " ", " ", '"', "\n  "])
        found[(begin + "".join(rng.choices(letters, k=rng.randint(2, 9)))).encode()] = None
    return list(found)


def sequence(index: int, sampling: SamplingParams) -> EngineSequence:
    """Return a sequence with one prompt token."""
    return EngineSequence(NewSequence(SequenceId(index), RequestId(f"r{index}"), [1], 1, sampling, []))


class Step:
    """Steps of ``count`` sequences, with a grammar each or without."""

    def __init__(self, writer: MaskWriter | None, count: int, vocab_size: int) -> None:
        self._writer = writer
        self._vocab_size = vocab_size
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)) if writer else None
        self._sampling = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0, eos_token_ids=[EOS], grammar=grammar)
        self._sequences = [self._new(index) for index in range(count)]
        self.mask_s: list[float] = []
        self.sample_s: list[float] = []

    def _new(self, index: int) -> EngineSequence:
        one = sequence(index, self._sampling)
        if self._writer is not None:
            one.constraint = GrammarConstraint(self._sampling, self._vocab_size)
        return one

    def run(self, logits: np.ndarray) -> None:
        """Compute masks, sample from ``logits`` [rows, vocab_size] and append; finished sequences begin again."""
        began_s = time.perf_counter()
        if self._writer is not None:
            self._write(self._writer)
        self.mask_s.append(time.perf_counter() - began_s)
        began_s = time.thread_time()
        outcomes = sample(logits, self._sequences)
        self.sample_s.append(time.thread_time() - began_s)
        for index, outcome in enumerate(outcomes):
            [token] = outcome.token_ids  # type: ignore[union-attr]
            self._sequences[index].token_ids.append(token)
            if token == EOS:
                self._sequences[index] = self._new(index)

    def _write(self, writer: MaskWriter) -> None:
        wanted = []
        for one in self._sequences:
            constraint = one.constraint
            assert isinstance(constraint, GrammarConstraint)
            wanted.append(Wanted(constraint, one.token_ids[1 + constraint.num_told :], ()))
            constraint.num_told = one.num_output_tokens
            constraint.computed = Future()
            constraint.computed.set_result(None)
        writer.write(wanted)


def main() -> None:
    """Print a row per batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    options = parser.parse_args()
    began_s = time.perf_counter()
    writer = MaskWriter(Vocabulary(words(options.vocab_size), []))
    console = Console()
    console.print(f"vocabulary of {options.vocab_size}: {time.perf_counter() - began_s:.2f} s")
    table = Table(
        "batch", "plain ms", "masks ms", "masks max ms", "with grammar ms", "added ms", "added ms per row", "ratio"
    )
    rng = np.random.default_rng(0)
    for count in options.batch_sizes:
        plain, masked = Step(None, count, options.vocab_size), Step(writer, count, options.vocab_size)
        for _ in range(options.steps):
            logits = rng.standard_normal((count, options.vocab_size), np.float32)
            plain.run(logits)
            masked.run(logits)
        alone, sampled, masks = (
            statistics.median(times) * 1e3 for times in (plain.sample_s, masked.sample_s, masked.mask_s)
        )
        table.add_row(
            str(count),
            f"{alone:.2f}",
            f"{masks:.2f}",
            f"{max(masked.mask_s[1:]) * 1e3:.2f}",
            f"{sampled:.2f}",
            f"{sampled - alone:.2f}",
            f"{(sampled - alone) / count:.3f}",
            f"{sampled / alone:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
