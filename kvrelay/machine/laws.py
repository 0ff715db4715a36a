"""Conservation laws of a machine: what must hold whenever it is at rest. Tests and running processes check the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from kvrelay.errors import LocalProtocolError

PART_BLOCKS = 2048
"""KV blocks looked at in one part of a check: about a millisecond."""


class Violation(NamedTuple):
    """A law that does not hold, in words. ``block``: the KV block that it is about, if it is about one."""

    text: str
    block: int | None = None


Laws: TypeAlias = Iterator[list[Violation]]
"""One check of all laws, in parts of bounded work. Each part yields what it found. Nothing may change between parts."""


def parts_of(count: int) -> Iterator[range]:
    """Return the ranges of at most ``PART_BLOCKS`` numbers that make up ``range(count)``."""
    for start in range(0, count, PART_BLOCKS):
        yield range(start, min(start + PART_BLOCKS, count))


def all_violations(laws: Laws) -> list[Violation]:
    """Make the whole check; return everything found."""
    return [violation for part in laws for violation in part]


def require(laws: Laws, what: str) -> None:
    """Make the whole check. Raises LocalProtocolError that begins with ``what`` and has everything found."""
    found = all_violations(laws)
    if found:
        raise LocalProtocolError(f"{what}: " + "; ".join(violation.text for violation in found))
