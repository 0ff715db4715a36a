"""A request on a node: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvrelay.protocol.ids import ROUTER, Attempt, BlockId, PeerId, RequestId
from kvrelay.protocol.quantities import Moment
from kvrelay.protocol.token_rules import TokenRules

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class GrammarKind(StrEnum):
    """What the text of a grammar is. ``CHOICE``: a JSON list of texts. ``GRAMMAR``: Lark's or llama.cpp's notation.

    ``COMPOSED``: a JSON object with ``lark``, a grammar in that notation, and ``parts``: by name, kind and text of each
    grammar that it refers to as ``@name``.
    """

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    COMPOSED = "composed"


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an output must be.

    The router has compiled it, so it is valid. What may come next follows from it and the output tokens so far, so no
    node keeps anything that another could lack.
    """

    kind: GrammarKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters. The router has checked every bound and filled in every default.

    ``seed`` is always set: the random number of an output token depends on it and on the token's position in the
    sequence only, so no batch, node, preemption or retry changes it.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    eos_token_ids: list[int] = msgspec.field(default_factory=list)
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """Alternatives to report with each output token; 0: only the token's own logprob; None: no logprobs."""
    grammar: Grammar | None = None
    """The output ends only where it satisfies the grammar: with an EOS or stop token there, or at ``max_tokens``."""
    num_prompt_logprobs: int | None = None
    """Alternatives to report with each prompt token but the first; None: no logprobs of the prompt."""
    token_rules: TokenRules | None = None
    """Tokens that the output may have, and sequences that it may not contain."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of a sampled token, and the ``num_logprobs`` most likely tokens in falling order."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of the prompt tokens from position ``start`` on, each after the tokens before it.

    ``ranks`` int32 [n]: how many tokens of the vocabulary are at least as likely. ``token_ids`` int32 and ``logprobs``
    float64 [n, 1 + num_alternatives], row by row: the token itself, then the most likely ones in falling order. All
    little-endian bytes: a prompt may have very many.
    """

    start: int
    num_alternatives: int
    ranks: bytes
    token_ids: bytes
    logprobs: bytes

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.ranks) // 4

    def starting_at(self, start: int) -> PromptLogprobs:
        """Return those from position ``start`` on, which is one of them."""
        skipped = start - self.start
        entries = skipped * (1 + self.num_alternatives)
        return PromptLogprobs(
            start,
            self.num_alternatives,
            self.ranks[4 * skipped :],
            self.token_ids[4 * entries :],
            self.logprobs[8 * entries :],
        )


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the router sends it to nodes. ``output_token_ids``: those delivered by earlier attempts.

    ``router``: the router that the request belongs to, set by the node that receives it from there.
    """

    request_id: RequestId
    epoch: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    priority: int = 0
    arrival_s: Moment = 0.0
    router: PeerId = ROUTER

    @property
    def attempt(self) -> Attempt:
        """The key of this attempt."""
        return Attempt(self.request_id, self.epoch)


class FinishReason(StrEnum):
    """Why a request ended without an error. The values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Constraint(Protocol):
    """The tokens that one sequence may have next: by its grammar, its token rules, or both."""

    def allowed(self, num_output_tokens: int) -> npt.NDArray[np.bool_]:
        """Return for each token of the vocabulary whether it may follow so many. Raises EngineError."""

    def words(self, num_output_tokens: int) -> npt.NDArray[np.int32]:
        """Return the same as bits, 32 to a word."""


class TokenSequence:
    """Tokens, prompt first, and sampling parameters: the input of the sampler.

    ``constraint``: set by an engine if ``sampling`` has a grammar or names the tokens that are allowed.
    """

    __slots__ = ("constraint", "num_prompt_tokens", "sampling", "token_ids")

    def __init__(self, token_ids: list[int], num_prompt_tokens: int, sampling: SamplingParams) -> None:
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self.sampling = sampling
        self.constraint: Constraint | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.token_ids) - self.num_prompt_tokens


class Sequence(TokenSequence):
    """The tokens and KV blocks of one request in the node's state machine.

    Only the machine accesses it. The engine has its own sequences, which plans update (``kvrelay.node.plans``).
    ``token_ids`` are those whose results have arrived. The KV of the first ``num_computed_tokens`` is in
    ``block_table``.
    """

    __slots__ = ("block_table", "num_computed_tokens", "spec")

    def __init__(self, spec: RequestSpec) -> None:
        super().__init__([*spec.prompt_token_ids, *spec.output_token_ids], len(spec.prompt_token_ids), spec.sampling)
        self.spec = spec
        self.num_computed_tokens = 0
        self.take_blocks(())

    def take_blocks(self, block_ids: Iterable[BlockId]) -> None:
        """Replace the block table by ``block_ids``."""
        self.block_table = list(block_ids)

    @property
    def attempt(self) -> Attempt:
        """The key of this attempt."""
        return self.spec.attempt

    @property
    def max_tokens(self) -> int:
        """Maximum number of output tokens."""
        return self.sampling.max_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Maximum number of further output tokens, never negative."""
        return max(0, self.sampling.max_tokens - len(self.token_ids) + self.num_prompt_tokens)

    def finish_reason(self) -> tuple[FinishReason, int | None] | None:
        """Return why the request ends after its newest token, with the stop token if any; None: it goes on."""
        sampling, last = self.sampling, self.token_ids[-1]
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        is_full = num_output_tokens >= sampling.max_tokens
        if num_output_tokens > sampling.min_tokens or is_full:
            if last in sampling.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, None
            if last in sampling.stop_token_ids:
                return FinishReason.STOP, last
        return (FinishReason.LENGTH, None) if is_full else None
