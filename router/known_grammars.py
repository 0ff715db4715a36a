"""Grammars that have been compiled once, so that they need not be compiled again to know that they are valid."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from kvrelay.protocol.request import Grammar


class KnownGrammars:
    """The digests of the last ``most`` valid grammars."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def has(self, grammar: Grammar) -> bool:
        """Return whether ``grammar`` is known to be valid."""
        digest = _digest(grammar)
        if digest not in self._digests:
            return False
        self._digests.move_to_end(digest)
        return True

    def add(self, grammar: Grammar) -> None:
        """Note that ``grammar`` is valid."""
        self._digests[_digest(grammar)] = None
        if len(self._digests) > self._most:
            self._digests.popitem(last=False)


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).digest()
