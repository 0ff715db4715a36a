"""Greedy answers from kvrelay's engine, with no node, scheduler or socket around it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from demo_model.tokenizer import END, render, token_id
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.engine.load import load_engine
from kvrelay.node.plans import Chunk, PlanWriter
from kvrelay.protocol.request import RequestSpec, SamplingParams, Sequence

MAX_MODEL_LEN = 4096


class Answerer:
    """Answers chats in batches of up to ``batch_size``."""

    def __init__(self, model_dir: Path, batch_size: int = 8, threads: int = 1) -> None:
        node = {"name": "m0", "role": "mixed", "port": 8200, "threads": threads}
        config = ClusterConfig.from_data(
            {
                "model": {"path": str(model_dir), "max_model_len": MAX_MODEL_LEN},
                "cache": {"num_blocks": batch_size * MAX_MODEL_LEN // 16, "block_size": 16},
                "nodes": [node],
            }
        )
        self._engine = load_engine(config.node("m0"), lambda _read, _size: None)
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._end = token_id(self._tokenizer, END)
        self._plans = PlanWriter()
        self._steps = 0

    def close(self) -> None:
        """Give back the engine's memory."""
        self._engine.close()

    def answers(self, chats: list[list[dict[str, str]]], max_tokens: list[int]) -> list[str]:
        """The answer to each chat, cut after its ``max_tokens``; at most ``batch_size`` chats."""
        sequences = [self._sequence(chat, most) for chat, most in zip(chats, max_tokens, strict=True)]
        self._give_blocks(sequences)
        for sequence in sequences:
            self._run([sequence])
        while running := [sequence for sequence in sequences if sequence.finish_reason() is None]:
            self._run(running)
        for sequence in sequences:
            self._plans.leave(sequence)
        return [
            self._tokenizer.decode(sequence.token_ids[sequence.num_prompt_tokens :], skip_special_tokens=True)
            for sequence in sequences
        ]

    def _sequence(self, chat: list[dict[str, str]], max_tokens: int) -> Sequence:
        prompt = self._tokenizer.encode(render(chat, add_generation_prompt=True), add_special_tokens=False).ids
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, eos_token_ids=[self._end])
        return Sequence(RequestSpec(request_id="check", epoch=0, prompt_token_ids=prompt, sampling=sampling))

    def _give_blocks(self, sequences: list[Sequence]) -> None:
        used = 0
        for sequence in sequences:
            count = self._engine.geometry.blocks_for(sequence.num_tokens + sequence.sampling.max_tokens)
            sequence.take_blocks(range(used, used + count))
            used += count

    def _run(self, sequences: list[Sequence]) -> None:
        """Compute what is not computed yet and add a token to each."""
        chunks = [Chunk(s.num_computed_tokens, s.num_tokens - s.num_computed_tokens, samples=True) for s in sequences]
        result = self._engine.run(self._plans.write(self._steps, sequences, chunks), lambda _layers: None)
        self._steps += 1
        for sequence, sampled in zip(sequences, result.sampled, strict=True):
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.token_ids += sampled.token_ids
