"""One request on a node, as far as prefill, decode and mixed nodes have it in common."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

import msgspec

from kvrelay.machine.lifecycle import Lifecycle
from kvrelay.protocol.messages.base import LayerTransfer, Mark
from kvrelay.protocol.messages.engine import SampledTokens
from kvrelay.protocol.messages.node_to_router import PromptLogprobsOut, RequestOutput, RequestTimeline
from kvrelay.protocol.request import FinishReason, RequestSpec, Sequence

S = TypeVar("S", bound=StrEnum)


class Holder(StrEnum):
    """What uses a request's blocks, beside the plans in flight. They are given back when nothing does."""

    REQUEST = "request"
    """The request itself: it computes, or will compute, in them. Ends when it is closed or handed to another node."""

    MESSAGER = "messager"
    """The cache messager reads them (P) or writes to them (D)."""

    STORE = "store"
    """A read from the store writes to them."""


class NodeRequest(Sequence, Generic[S]):
    """One attempt at a request: its sequence, its status, and who uses its blocks.

    ``hashes`` are those of its full blocks. ``num_stored_tokens`` of its ``num_cached_tokens`` are from the store.
    ``status``, and with it ``is_over``, changes by ``RequestTable.move`` only. ``OVER`` are the statuses in which
    nothing more is sent about it. ``is_over`` says whether it has one of them; every step asks this of its requests.
    """

    __slots__ = (
        "arrival_s",
        "hashes",
        "holders",
        "is_over",
        "lifecycle",
        "marks",
        "num_cached_tokens",
        "num_stored_tokens",
    )

    OVER: ClassVar[frozenset[StrEnum]]

    def __init__(self, spec: RequestSpec, hashes: list[bytes], lifecycle: Lifecycle[S], now: float) -> None:
        super().__init__(spec)
        self.arrival_s = now
        self.hashes = hashes
        self.lifecycle = lifecycle
        self.is_over = lifecycle.status in self.OVER
        self.holders = {Holder.REQUEST}
        self.num_cached_tokens = 0
        self.num_stored_tokens = 0
        self.marks: list[tuple[str, float]] = []

    @property
    def status(self) -> S:
        """Where it stands."""
        return self.lifecycle.status

    @property
    def reusable_hashes(self) -> list[bytes]:
        """The hashes of the full blocks that need not be computed if their KV is found.

        None if the logprobs of the prompt are still to be computed: they need the hidden states of all its tokens.
        """
        return self.hashes if self.sampling.num_prompt_logprobs is None else []

    @property
    def next_position(self) -> int:
        """Where its next chunk begins: the newest token is always computed, for the next one's logits."""
        return min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to compute before the next output token: one at least."""
        return len(self.token_ids) - self.next_position

    def take(self, sampled: SampledTokens) -> RequestOutput:
        """Append what was sampled, up to the token that ends the request; return what the router is to know of it."""
        spec, index, finish = self.spec, len(self.token_ids) - self.num_prompt_tokens, None
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        for num_taken, token in enumerate(token_ids, 1):
            self.token_ids.append(token)
            finish = self.finish_reason()
            if finish is not None:
                token_ids, logprobs = token_ids[:num_taken], logprobs[:num_taken]
                break
        if finish is not None and not self.sampling.max_tokens:  # only the prompt was wanted
            token_ids, logprobs, finish = [], [], (FinishReason.LENGTH, None)
        return RequestOutput(
            request_id=spec.request_id,
            epoch=spec.epoch,
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish[0] if finish else None,
            stop_token_id=finish[1] if finish else None,
            num_cached_tokens=self.num_cached_tokens,
        )

    def prompt_logprobs_out(self, sampled: SampledTokens) -> list[PromptLogprobsOut]:
        """Return what the router is to know of the prompt after a chunk of it."""
        request_id, epoch = self.spec.request_id, self.spec.epoch
        return [
            PromptLogprobsOut(request_id=request_id, epoch=epoch, logprobs=logprobs)
            for logprobs in sampled.prompt_logprobs
        ]

    def prompt_computed(self) -> None:
        """Note that the router has been told all logprobs of the prompt: nobody needs to compute them again."""
        if self.sampling.num_prompt_logprobs is not None:
            self.sampling = msgspec.structs.replace(self.sampling, num_prompt_logprobs=None)
            self.spec = msgspec.structs.replace(self.spec, sampling=self.sampling)

    def mark(self, name: str, now: float) -> None:
        """Note a moment for the timeline."""
        self.marks.append((name, now))

    def prompt_sources(self) -> dict[str, int]:
        """Return where the KV of its prompt came from on this node, in tokens by source."""
        num_cached = min(self.num_cached_tokens, self.num_prompt_tokens)
        num_stored = min(self.num_stored_tokens, num_cached)
        return {
            "computed": self.num_prompt_tokens - num_cached,
            "cached": num_cached - num_stored,
            "stored": num_stored,
        }

    def layer_transfers(self) -> list[LayerTransfer]:
        """Return how its KV travelled from here, layer by layer: nothing, unless this node sent it."""
        return []

    def timeline(self, node: str) -> RequestTimeline:
        """Return its moments on this node, for the router."""
        return RequestTimeline(
            request_id=self.spec.request_id,
            epoch=self.spec.epoch,
            marks=[Mark(name, at_s, node) for name, at_s in self.marks],
            layers=self.layer_transfers(),
        )
