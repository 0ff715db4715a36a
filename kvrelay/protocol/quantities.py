"""Numbers in messages, with the bounds within which the reader takes them. NaN is within none.

A peer may send any float that MessagePack has. A timer of infinite seconds ends the event loop, and JSON has no such
numbers. Log probabilities are not among these: minus infinity is one.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

MAX_DURATION_S = 86_400.0
"""The longest duration in messages: no setting that one follows from may be longer."""

_MAX_MOMENT_S = 1e12
_MAX_AMOUNT = 1e300

Duration: TypeAlias = Annotated[float, Meta(ge=0.0, le=MAX_DURATION_S)]
"""Seconds, for timers and deadlines."""

Moment: TypeAlias = Annotated[float, Meta(ge=-_MAX_MOMENT_S, le=_MAX_MOMENT_S)]
"""Seconds of wall-clock time."""

Speed: TypeAlias = Annotated[float, Meta(ge=0.0, le=_MAX_AMOUNT)]
"""Tokens or bytes per second."""

Amount: TypeAlias = Annotated[float, Meta(ge=-_MAX_AMOUNT, le=_MAX_AMOUNT)]
"""A value of a metric."""
