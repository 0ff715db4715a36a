"""The section ``faults`` of the cluster config: faults injected on purpose."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from kvrelay.config.base import Section, refuse
from kvrelay.protocol.codec import MESSAGES

FaultKind: TypeAlias = Literal["drop", "delay", "overtake", "duplicate", "corrupt"]
"""What may happen to a message. The fake link of the tests has the same kinds."""

ANY_MESSAGE = "*"

Rate = Annotated[float, Field(ge=0, le=1)]


class FaultsConfig(Section):
    """Faults injected on purpose, for exercises and tests. Everything is off by default. Never use it in production."""

    messages: dict[str, dict[FaultKind, Rate]] = Field(
        default={},
        description='Share of messages that suffer a fault, by message type ("*": all types without an entry of their '
        "own) and kind. drop: it is lost; delay: it comes later, and what follows it on the connection after it; "
        "overtake: it comes later than what follows it; duplicate: it comes twice; corrupt: a bit of the KV that "
        "follows it is wrong (KVFrame over links ipc and tcp). Messages between a node and its messager are spared.",
    )
    max_delay_s: float = Field(
        0.05, gt=0, le=3600, description="Maximum delay of messages, in seconds; each is random up to it."
    )
    store_delay_rate: Rate = Field(0.0, description="Share of the calls of the store that are slow.")
    store_delay_s: float = Field(1.0, gt=0, le=3600, description="Seconds that a slow call takes longer.")
    stop_every_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="kvrelay up stops each process (SIGSTOP) after a random time, in seconds, with this mean; default: "
        "never.",
    )
    stop_s: float = Field(2.0, gt=0, le=3600, description="Seconds until a stopped process continues.")
    seed: int = Field(0, ge=0, le=1 << 62, description="Seed of all random choices.")

    @model_validator(mode="after")
    def _known_messages(self) -> Self:
        for name in self.messages:
            if name != ANY_MESSAGE and name not in MESSAGES:
                raise refuse(f"there is no message {name[:64]!r}", "messages", name)
        return self

    @property
    def is_active(self) -> bool:
        """Whether any fault is injected."""
        return bool(self.messages or self.store_delay_rate or self.stop_every_s is not None)
