"""An engine without a model or Paddle: its tokens are a hash of what the KV pool holds.

For each token it writes into every layer words that derive from the layer, the position and a hash of all tokens up
to it. To sample, it reads the K and V of every position of the context back through the block table and hashes that.
So a block that is wrong, missing, stale or out of place gives another token, which is what tests of the machinery
around it need. The tokens depend on the context alone (and, if they are drawn, on the seed): not on node, batch or
chunks.

``broken_token`` stands for a token whose embedding is not finite: a sequence fails in the step that computes it, and
what that step writes for the sequence is wrong from its first position on. In the step that computes ``fatal_token``
the device is lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvrelay.config.cluster_config import FakeEngineConfig
from kvrelay.engine.batch import BatchAssembler, RaggedBatch, Span, StepLimits
from kvrelay.engine.fake_words import Context, KVWords, fake_logits, favourite_token
from kvrelay.engine.prompt_logprobs import PromptRows, add_prompt_logprobs, logprobs_of, prompt_rows
from kvrelay.engine.sampler import GREEDY_BELOW, ahead, changes_logits, sample
from kvrelay.engine.sequences import EngineSequences, ScheduledSequence
from kvrelay.errors import DeviceError, EngineError
from kvrelay.grammar.constraint import GrammarConstraint, Wanted
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.kv_pool.device_memory import DeviceMemory
from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import SequenceId
from kvrelay.protocol.messages.engine import (
    SampledTokens,
    ScheduledTokens,
    SequenceFailed,
    SequenceOutcome,
    StepPlan,
    StepResult,
)
from kvrelay.protocol.request import (
    PromptLogprobs,
    RequestSpec,
    SamplingParams,
    Sequence,
    TokenLogprobs,
    TokenSequence,
)


class FakeEngine:
    """An ``interface.Engine`` without a model. ``sleep`` is called with the seconds each layer takes.

    ``grammars``: default: those of the plain tokens. They are closed with the engine.
    """

    def __init__(
        self,
        config: FakeEngineConfig,
        block_size: int,
        num_blocks: int,
        sleep: Callable[[float], None] = time.sleep,
        grammars: GrammarMasks | None = None,
    ) -> None:
        self.geometry = fake_geometry(config, block_size)
        self._words = KVWords(self.geometry)
        self.memory: KVMemory | DeviceMemory = _make_pool(config, self.geometry, num_blocks)
        self.max_model_len = config.max_model_len
        self.vocab_size = config.vocab_size
        self.max_plans_in_flight = config.max_plans_in_flight
        self._config = config
        self._sleep = sleep
        self._assembler = BatchAssembler(StepLimits(block_size, num_blocks, config.max_model_len, config.vocab_size))
        self._grammars = grammars or GrammarMasks(config.vocab_size)
        self._sequences = EngineSequences(self._grammars)
        self._contexts: dict[SequenceId, Context] = {}
        self._is_lost = False
        slots = num_blocks * block_size
        planes = (config.num_layers * 2, slots, self._words.words_per_token)
        memory = self.memory
        words = memory.planes if isinstance(memory, KVMemory) else memory.blocks.words
        self._pool = words.reshape(-1).view(np.uint64).reshape(planes)

    def run(self, plan: StepPlan, on_layers: Callable[[range], None]) -> StepResult:
        """A step takes the ``step_seconds`` of the config's cost model."""
        layer_s = step_seconds(self._config, plan.batch) / self.geometry.num_layers
        steps = self.layers(plan)
        while not isinstance(done := next(steps), StepResult):
            if layer_s > 0:
                self._sleep(layer_s)
            on_layers(range(done, done + 1))
        return done

    def layers(self, plan: StepPlan) -> Iterator[int | StepResult]:
        """Yield each layer as soon as its KV is in the pool, then the result. For callers that simulate time."""
        if not plan.batch:
            raise EngineError("a step without sequences")
        items = self._sequences.apply(plan)
        self._sequences.begin_masks(items)
        for id in plan.left:
            self._contexts.pop(id, None)
        if self._config.fatal_token is not None:
            self._require_device(items, self._config.fatal_token)
        batch = self._assembler.assemble(items)
        outcomes = (yield from self._compute(batch)) if batch.items else []
        yield self._sequences.result(plan, items, batch.outcomes(outcomes))

    def _compute(self, batch: RaggedBatch) -> Generator[int, None, list[SequenceOutcome]]:
        """Yield each layer as soon as its KV is in the pool; return the outcome of each of the batch's items."""
        chains = np.concatenate([self._chain(span, batch.items[span.index]) for span in batch.spans])
        words = self._words.of_tokens(chains if batch.written_rows is None else chains[batch.written_rows])
        written = np.unique(batch.slot_mapping // self.geometry.block_size).tolist()
        for layer in range(self.geometry.num_layers):
            planes = slice(2 * layer, 2 * layer + 2)
            self._pool[planes, batch.slot_mapping] = words[planes]
            if isinstance(self.memory, DeviceMemory):
                self.memory.begin_digest(range(layer, layer + 1), written).wait()
            yield layer
        outcomes: list[SequenceOutcome] = [SampledTokens([], []) for _ in batch.items]
        for span in batch.spans:
            outcomes[span.index] = self._outcome(span, batch.items[span.index])
        if self._sequences.want_prompt_logprobs:
            self._add_prompt_logprobs(outcomes, batch)
        return outcomes

    def _add_prompt_logprobs(self, outcomes: list[SequenceOutcome], batch: RaggedBatch) -> None:
        spans = {span.index: span for span in batch.spans}

        def compute(piece: PromptRows) -> PromptLogprobs:
            slots = spans[piece.place].slots(0)[: piece.start + len(piece.targets) - 1]
            hashes = self._words.context_hashes(np.take(self._pool, slots, axis=1, mode="clip"))
            params = batch.items[piece.place].sequence.sampling
            return fake_prompt_logprobs(self._config, params, hashes[piece.start - 1 :], piece)

        wanted = prompt_rows(batch.items, batch.first_rows, self.vocab_size)
        add_prompt_logprobs(outcomes, wanted, self.vocab_size, compute)

    def _require_device(self, items: list[ScheduledSequence], fatal: int) -> None:
        """Raise DeviceError from the first step on that computes token ``fatal``."""
        self._is_lost |= any(
            fatal in item.sequence.token_ids[item.start : item.start + item.num_tokens] for item in items
        )
        if self._is_lost:
            raise DeviceError(f"the fake device has computed token {fatal}")

    def close(self) -> None:
        self._grammars.close()
        del self._pool
        self.memory.close()

    def _outcome(self, span: Span, item: ScheduledSequence) -> SequenceOutcome:
        broken = self._broken_position(item)
        if broken is not None:
            return SequenceFailed(f"the model's hidden states are not finite at position {broken}")
        return self._sample(span, item) if item.samples else SampledTokens([], [])

    def _broken_position(self, item: ScheduledSequence) -> int | None:
        """Return the first position of the broken token among the tokens computed, its drafts apart."""
        ids = item.sequence.token_ids[item.start : item.start + item.num_tokens - len(item.drafts or ())]
        broken = self._config.broken_token
        return item.start + ids.index(broken) if broken is not None and broken in ids else None

    def _sample(self, span: Span, item: ScheduledSequence) -> SequenceOutcome:
        """Read the context back and sample after the newest token, and after each draft that is accepted.

        A broken token among those sampled is left to the next step, which computes it as its newest.
        """
        drafts = item.drafts or ()
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for place, draft in enumerate((*drafts, None)):
            slots = span.slots(0)[: span.context_len - len(drafts) + place]
            # no slot is outside of the pool, so nothing is clipped: it is merely the quick mode
            context = self._words.context_hash(np.take(self._pool, slots, axis=1, mode="clip"))
            outcome = sample_fake(self._config, ahead(item.sequence, token_ids), context)
            if isinstance(outcome, SequenceFailed):
                return SampledTokens(token_ids, logprobs) if token_ids else outcome
            token_ids += outcome.token_ids
            logprobs += outcome.logprobs
            if outcome.token_ids[0] != draft or draft == self._config.broken_token:
                break
        return SampledTokens(token_ids, logprobs)

    def _chain(self, span: Span, item: ScheduledSequence) -> npt.NDArray[np.uint64]:
        """Return the chained hash at each position of ``span``, going on from where the sequence was last."""
        id, drafts = item.sequence.id, item.drafts or ()
        context = self._contexts.get(id)
        if context is None or context.num_tokens > span.start:
            context = self._contexts[id] = Context()
        chain = context.extend(item.sequence.token_ids[context.num_tokens : span.context_len - len(drafts)])
        if drafts:
            chain = np.concatenate([chain, replace(context).extend(drafts)])
        chain = chain[-span.num_tokens :]
        return chain if self._broken_position(item) is None else ~chain


def fake_geometry(config: FakeEngineConfig, block_size: int) -> KVGeometry:
    """Return the shape of a fake engine's KV cache: one byte per element."""
    return KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype="uint8",
        model_digest=f"fake-{config.vocab_size}",
    )


def step_seconds(config: FakeEngineConfig, batch: Seq[ScheduledTokens]) -> float:
    """Return how long a step of ``batch`` takes: a sum over its tokens, decodes and their context."""
    prefill = sum(item.num_tokens for item in batch if item.num_tokens > 1)
    decodes = sum(item.num_tokens == 1 for item in batch)
    context = sum(item.start + item.num_tokens for item in batch)
    return (
        config.step_s
        + prefill * config.prefill_token_s
        + decodes * config.decode_token_s
        + context * config.context_token_s
    )


def sample_fake(config: FakeEngineConfig, sequence: TokenSequence, context_hash: int) -> SequenceOutcome:
    """Return the token after a context of ``context_hash``, by the same sampler that real logits go through."""
    params = sequence.sampling
    favourite = _favourite(config, params, context_hash)
    is_changed = changes_logits(sequence) or sequence.constraint is not None
    if params.temperature < GREEDY_BELOW and params.num_logprobs is None and not is_changed:
        return SampledTokens([favourite], [])
    logits = fake_logits(context_hash, config.vocab_size, favourite)
    return sample(logits[None], [sequence])[0]


def fake_prompt_logprobs(
    config: FakeEngineConfig, params: SamplingParams, context_hashes: npt.NDArray[np.uint64], rows: PromptRows
) -> PromptLogprobs:
    """Return the log probabilities of ``rows``, each after a context of ``context_hashes[i]``."""
    hashes = context_hashes.tolist()
    logits = [fake_logits(value, config.vocab_size, _favourite(config, params, value)) for value in hashes]
    return logprobs_of(np.stack(logits), rows)


def _favourite(config: FakeEngineConfig, params: SamplingParams, context_hash: int) -> int:
    eos = () if params.ignore_eos else tuple(params.eos_token_ids)
    return favourite_token(context_hash, config.vocab_size, eos, config.eos_every)


def reference_prompt_logprobs(spec: RequestSpec, config: FakeEngineConfig, block_size: int = 16) -> PromptLogprobs:
    """Return the log probabilities of a prompt of two tokens or more, computed at once and without a pool."""
    words, prompt, wanted = KVWords(fake_geometry(config, block_size)), spec.prompt_token_ids, spec.sampling
    assert wanted.num_prompt_logprobs is not None
    hashes = words.context_hashes(words.of_tokens(Context().extend(prompt[:-1])))
    rows = PromptRows(0, np.arange(len(hashes)), prompt[1:], 1, min(wanted.num_prompt_logprobs, config.vocab_size))
    return fake_prompt_logprobs(config, wanted, hashes, rows)


def reference_tokens(spec: RequestSpec, config: FakeEngineConfig, block_size: int = 16) -> list[int]:
    """Return all output tokens a clean run of ``spec`` gives, computed without a pool; up to its error if it fails."""
    with contextlib.closing(GrammarMasks(config.vocab_size)) as grammars:
        return _reference_tokens(spec, config, block_size, grammars)


def _reference_tokens(
    spec: RequestSpec, config: FakeEngineConfig, block_size: int, grammars: GrammarMasks
) -> list[int]:
    words = KVWords(fake_geometry(config, block_size))
    sequence = Sequence(spec)
    sequence.constraint = constraint = grammars.constraint(spec.sampling)
    context = Context()
    total = words.context_hash(words.of_tokens(context.extend(sequence.token_ids)))
    while True:
        if isinstance(constraint, GrammarConstraint):
            grammars.begin(
                [Wanted(constraint, sequence.token_ids[sequence.num_prompt_tokens + constraint.num_told :], ())]
            )
        outcome = sample_fake(config, sequence, total)
        if not isinstance(outcome, SequenceFailed):
            sequence.token_ids += outcome.token_ids
        if isinstance(outcome, SequenceFailed) or sequence.finish_reason() is not None:
            return sequence.token_ids[sequence.num_prompt_tokens :]
        position = context.num_tokens
        newest = words.of_tokens(context.extend(sequence.token_ids[position:]))
        total = (total + words.context_hash(newest, position)) % (1 << 64)


def _make_pool(config: FakeEngineConfig, geometry: KVGeometry, num_blocks: int) -> KVMemory | DeviceMemory:
    if config.device_pool:
        return DeviceMemory.create(geometry, num_blocks, "simulated")
    return KVMemory.create(geometry, num_blocks)
