"""Reordering of one request's output tokens."""

from __future__ import annotations

import msgspec

from kvrelay.protocol.messages.node_to_router import RequestOutput


class OutputOrder:
    """Accepts outputs in any order and returns them in index order, each token once.

    The first token comes from P and the others from D, over different connections, so the second may arrive first.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._early: dict[int, RequestOutput] = {}

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
