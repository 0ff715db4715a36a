"""Sequences with all kinds of sampling parameters, and what the host's sampler draws for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.ids import block_ids

from kvrelay.engine.batch import StepLimits
from kvrelay.engine.device.batch import BatchAssembler
from kvrelay.engine.device.operations import Sampled, StepShape
from kvrelay.engine.device.sequence_rows import SequenceRows
from kvrelay.engine.device.step_buffer import StepBuffer
from kvrelay.engine.device.step_slot import UploadArena
from kvrelay.engine.device.tiles import TileCutter
from kvrelay.engine.device.torch_framework import TorchFramework
from kvrelay.engine.sequences import EngineSequence, ScheduledSequence
from kvrelay.protocol.ids import RequestId, SequenceId
from kvrelay.protocol.messages.engine import NewSequence
from kvrelay.protocol.request import SamplingParams
from kvrelay.protocol.token_rules import BadWords, TokenRules, mask_words

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e-6, "top_p": 0.5},
    {"repetition_penalty": 1.8},
    {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "frequency_penalty": -1.0, "logit_bias": {3: 8.0, 11: -100.0}},
    {"logit_bias": {5: 100.0}},
    {"min_tokens": 50, "eos_token_ids": [2], "stop_token_ids": [9], "logit_bias": {2: 100.0, 9: 50.0}},
    {"token_rules": TokenRules(bad_words=BadWords.of([[3], *([token, token % 5] for token in range(50))]))},
    {"temperature": 1.0, "num_logprobs": 0},
    {"num_logprobs": 5},
    {"temperature": 0.8, "top_p": 0.95, "num_logprobs": 20, "repetition_penalty": 1.2},
]


def sequence(tokens: list[int], name: str, **sampling: Any) -> EngineSequence:
    """Return a sequence, greedy unless ``sampling`` says otherwise."""
    params = SamplingParams(**{"max_tokens": 64, "seed": 0, "temperature": 0.0, **sampling})
    new = NewSequence(
        id=SequenceId(1),
        request_id=RequestId(name),
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=params,
        block_table=block_ids(0, 1),
    )
    return EngineSequence(new)


def sequences(vocab_size: int, count: int, seed: int) -> list[EngineSequence]:
    """Return ``count`` sequences with a prompt and some output each, of every kind in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        params = {"seed": int(rng.integers(1 << 62)), **KINDS[number % len(KINDS)]}
        one = sequence(rng.integers(0, vocab_size, 9).tolist(), f"r{number}", **params)
        one.token_ids += rng.integers(0, vocab_size, int(rng.integers(0, 12))).tolist()
        made.append(one)
    return made


def logits(vocab_size: int, count: int, seed: int) -> np.ndarray:
    """Return logits with ties among the highest and at the edges of filters."""
    values = np.random.default_rng(seed).standard_normal((count, vocab_size)).astype(np.float32) * 3
    values[::3] = np.round(values[::3] * 2) / 2
    return values


def sample_on(operations: Any, device: str, batch: list[ScheduledSequence], values: np.ndarray) -> Sampled:
    """Return what ``operations`` sample from ``values``, on the host."""
    framework = TorchFramework(device)
    rows = SequenceRows(4 * len(batch), 4, 8)
    limits = StepLimits(block_size=16, num_blocks=8, max_model_len=64, vocab_size=values.shape[1])
    assembler = BatchAssembler(limits, rows, TileCutter(operations.tile_rows, None), max_num_tokens=1024)
    assembled = assembler.assemble(batch)
    count = len(batch)
    most = 0 if assembled.adjustments is None else len(assembled.adjustments.tokens)
    masks = framework.zeros((4 * count, mask_words(values.shape[1])), "int32")
    buffer = StepBuffer(framework, StepShape(4 * count, count, count, 4 * count), most, masks)
    assembler.fill(buffer, UploadArena(framework, buffer.num_words + 5 * most), assembled)
    if assembled.masks is not None:
        words = assembled.masks.words
        masks[: len(words)] = framework.upload(words, "int32")
    last_tokens = framework.zeros((count,), "int32")
    step = buffer.tensors(assembled.shape)
    sampled = operations.sample(framework.upload(values, "float32"), step, last_tokens)
    noted = assembled.samples.noted
    is_noted = torch.from_numpy(noted >= 0)
    where = torch.from_numpy(noted[noted >= 0]).long()
    assert last_tokens.cpu()[where].tolist() == sampled.tokens.cpu()[is_noted].tolist()
    return Sampled(*(one.cpu() for one in sampled))
