"""Reordering of one request's output tokens, and which log probabilities of its prompt are delivered."""

from __future__ import annotations

import msgspec

from kvrelay.protocol.messages.node_to_router import RequestOutput
from kvrelay.protocol.request import PromptLogprobs


class OutputOrder:
    """Accepts outputs in any order and returns them in index order, each token once.

    The first token comes from P and the others from D, over different connections, so the second may arrive first.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._early: dict[int, RequestOutput] = {}

    @property
    def has_gap(self) -> bool:
        """Whether outputs have come whose tokens follow some that have not."""
        return bool(self._early)

    def take(self, output: RequestOutput) -> list[RequestOutput]:
        """Add ``output``; return the outputs that can be delivered now."""
        if output.index == len(self.token_ids) and not self._early:
            self.token_ids += output.token_ids
            return [output]
        self._early[output.index] = output
        ready = []
        while self._early and (first := min(self._early)) <= len(self.token_ids):
            following = self._without_known(self._early.pop(first))
            if following is not None:
                self.token_ids += following.token_ids
                ready.append(following)
        return ready

    def drop_early(self) -> None:
        """Drop buffered outputs, because the attempt they belong to has ended."""
        self._early.clear()

    def _without_known(self, output: RequestOutput) -> RequestOutput | None:
        """Return ``output`` without the tokens already delivered, or None if none is new."""
        known = len(self.token_ids) - output.index
        if known <= 0:
            return output
        if known >= len(output.token_ids):
            return None
        return msgspec.structs.replace(
            output,
            index=len(self.token_ids),
            token_ids=output.token_ids[known:],
            logprobs=output.logprobs[known:],
        )


class PromptOrder:
    """Accepts the log probabilities of a prompt from each attempt, and returns each once.

    They come over one connection, in order, so they are complete or the attempt has failed. ``num_positions``: prompt
    tokens, or 0 if no log probabilities are wanted; there are none of the first one.
    """

    __slots__ = ("_next", "_num_positions")

    def __init__(self, num_positions: int) -> None:
        self._next = 1
        self._num_positions = num_positions

    @property
    def is_complete(self) -> bool:
        """Whether nothing is wanted any more."""
        return self._next >= self._num_positions

    def take(self, logprobs: PromptLogprobs) -> PromptLogprobs | None:
        """Return the part of ``logprobs`` that can be delivered now, or None if there is none."""
        if not logprobs.start <= self._next < logprobs.end <= self._num_positions:
            return None
        following = logprobs.starting_at(self._next)
        self._next = logprobs.end
        return following
