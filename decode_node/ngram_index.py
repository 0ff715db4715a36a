"""Where runs of tokens occurred before in a sequence that grows."""

from __future__ import annotations


class NgramIndex:
    """Where each run of ``shortest`` to ``longest`` tokens of a growing sequence ended last; indexes a token once."""

    __slots__ = ("_ends", "_num_indexed", "_sizes")

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def find(self, token_ids: list[int]) -> int | None:
        """Return the position after an earlier occurrence of the longest indexed run that ends ``token_ids``, or None.

        Indexes all tokens but the newest, so that the newest run finds an earlier one and not itself.
        """
        for end in range(self._num_indexed + 1, len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        runs = (tuple(token_ids[-size:]) for size in self._sizes if size <= len(token_ids))
        return next((self._ends[run] for run in runs if run in self._ends), None)
